"""The documents say what is there: every module in the file map, every limit as in the code, links that lead somewhere,
code that runs."""

from __future__ import annotations

import dataclasses
import doctest
import importlib
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "semel"
INTERNALS = ROOT / "docs" / "internals.md"
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])

_UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "s": 1, "min": 60, "h": 3_600, "": 1}


def section(page: Path, title: str) -> str:
    """What stands under one heading of the second level."""
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", page.read_text(), re.MULTILINE | re.DOTALL)
    assert found, f"{page} has no section {title!r}"
    return found[1]


def rows(text: str) -> Iterator[list[str]]:
    """The cells of every table row that is not a heading."""
    for line in text.splitlines():
        if line.startswith("|") and not line.startswith("|---"):
            yield [cell.strip() for cell in line.strip("|").split("|")]


# --- The file map ---


def test_every_module_is_in_the_file_map_and_every_name_in_it_exists() -> None:
    mapped = [cells[0].strip("`") for cells in rows(section(INTERNALS, "File map")) if cells[0].startswith("`")]
    modules = set()
    for path in SOURCE.rglob("*.py"):
        name = path.relative_to(SOURCE).as_posix()
        modules.add(name.removesuffix("__init__.py") or name)
    assert sorted(modules - set(mapped)) == [], "modules that the map does not name"
    assert sorted(set(mapped) - modules) == [], "names in the map that are no modules"
    assert len(mapped) == len(set(mapped)), "a module stands there twice"


def test_the_map_says_something_of_every_module() -> None:
    for cells in rows(section(INTERNALS, "File map")):
        assert len(cells) == 2
        assert cells[1]


# --- The limits ---


def limits() -> list[tuple[str, str, str]]:
    """(name, value, where) of every row of the limits table."""
    found = [(cells[0], cells[1], cells[2].strip("`")) for cells in rows(section(INTERNALS, "Limits"))]
    return [row for row in found if row[0] != "limit"]


def actual(where: str) -> tuple[str, float]:
    """Name and value of a constant or of a dataclass field's default: `room/module.py: Name` or `...: Class.field`."""
    path, _, name = where.partition(": ")
    module: Any = importlib.import_module("semel." + path.removesuffix(".py").replace("/", "."))
    owner, _, attribute = name.rpartition(".")
    if not owner:
        return attribute, float(getattr(module, attribute))
    fields = {item.name: item.default for item in dataclasses.fields(getattr(module, owner))}
    return attribute, float(fields[attribute])


@pytest.mark.parametrize(("name", "value", "where"), limits(), ids=lambda text: str(text)[:60])
def test_a_limit_in_the_table_is_the_one_in_the_code(name: str, value: str, where: str) -> None:
    number, _, unit = value.replace(",", "").partition(" ")
    attribute, found = actual(where)
    in_milliseconds = attribute.lower().endswith("_ms")
    assert found == float(number) * _UNITS[unit] * (1_000 if in_milliseconds else 1)


def test_every_bound_of_the_rooms_that_list_them_is_in_the_table() -> None:
    listed = {where for _, _, where in limits()}
    from semel.ingress.limits import Limits
    from semel.processing import limits as processing

    wanted = {f"processing/limits.py: {name}" for name in processing.__all__}
    wanted |= {f"ingress/limits.py: Limits.{item.name}" for item in dataclasses.fields(Limits)}
    assert sorted(wanted - listed) == []


# --- Links and names ---


def slug(heading: str) -> str:
    """The anchor that GitHub makes of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def anchors(page: Path) -> set[str]:
    return {slug(title) for title in re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"[a-z]+:", target):
            continue  # The web is not ours.
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    assert broken == []


def test_the_tests_that_the_list_of_bad_input_names_exist() -> None:
    text = (ROOT / "tests" / "test_bad_input.py").read_text().split('"""')[1]
    named = re.findall(r"([\w/]+\.py)(?:::(\w+))?", text)
    assert len(named) > 20
    for path, test in named:
        source = (ROOT / "tests" / path).read_text()
        assert f"def {test}(" in source or not test, f"{path}::{test}"


def test_every_setting_and_failpoint_variable_is_documented() -> None:
    from semel.settings import Settings

    text = (ROOT / "docs" / "howto.md").read_text()
    for item in dataclasses.fields(Settings):
        if item.name == "kafka_client":  # Has a name for each of librdkafka's settings, by the rule that is there.
            assert "`SEMEL_KAFKA_CONFIG`" in text
            assert "`SEMEL_KAFKA_<NAME>`" in text
            continue
        assert f"`SEMEL_{item.name.upper()}`" in text


def test_every_setting_of_kafkas_clients_is_documented_with_its_default() -> None:
    from semel.client.config import CONSUMER_DEFAULTS, DEFAULTS, SETTINGS

    page = ROOT / "docs" / "howto.md"
    text = section(page, "Use a Kafka that wants TLS and a login") + section(page, "Settings of Kafka's clients")
    assert {name for name in SETTINGS if not re.search(rf"`{re.escape(name)}[`=]", text)} == set()
    told = {name: value for names, values, _ in rows(text) for name, value in _with_defaults(names, values)}
    known = {name: str(default.value) for name, default in (DEFAULTS | CONSUMER_DEFAULTS).items()}
    assert {name: told.get(name) for name in known} == known


def _with_defaults(names: str, values: str) -> list[tuple[str, str]]:
    """Two names with one default are two names of one setting."""
    found, defaults = re.findall(r"`([^`]+)`", names), values.split(", ")
    return list(zip(found, defaults * len(found) if len(defaults) == 1 else defaults, strict=False))


def test_every_metric_is_documented_and_every_documented_one_exists() -> None:
    sources = "".join(path.read_text() for path in SOURCE.rglob("*.py"))
    made = set(re.findall(r'(?:counter|gauge)\(\s*"(semel_\w+)"', sources))
    documented = set(re.findall(r"`(semel_[a-z_]+)`", section(ROOT / "docs" / "howto.md", "Watch it")))
    assert made == documented


# --- Code ---


def python_blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_blocks_run(page: Path, tmp_path: Path) -> None:
    for number, block in enumerate(python_blocks(page)):
        code = tmp_path / f"test_block_{number}.py"
        code.write_text(block.replace('"/tmp/', f'"{tmp_path}/'))
        by_pytest = ["-m", "pytest", "-q", "-p", "no:cacheprovider"] if "def test_" in block else []
        done = subprocess.run(
            [sys.executable, *by_pytest, str(code)],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, f"block {number} of {page.name}:\n{done.stdout}{done.stderr}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_sessions_give_what_they_say(page: Path) -> None:
    examples = doctest.DocTestParser().get_doctest(page.read_text(), {}, page.name, str(page), 0)
    assert examples.examples or page.name != "tutorial.md"
    failed: list[str] = []
    doctest.DocTestRunner(verbose=False).run(examples, out=failed.append)
    assert failed == []


def test_the_apps_of_the_readme_are_apps_that_semel_can_run(tmp_path: Path) -> None:
    """What the README tells to type finds the app in what it tells to write."""
    [block] = python_blocks(ROOT / "README.md")
    (tmp_path / "tiny.py").write_text(block)
    done = subprocess.run(
        [sys.executable, "-m", "semel", "guarantees", "tiny:app"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "POST /orders" in done.stdout
    probe = "import tiny; print(list(tiny.place(tiny.Order(1, 'a', 5)))[0].topic.name)"
    run = subprocess.run([sys.executable, "-c", probe], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.stdout == "tiny-orders\n", run.stderr


def test_the_shop_of_the_documents_is_the_shop_that_ships() -> None:
    shipped = (SOURCE / "examples" / "shop.py").read_text()
    assert (ROOT / "examples" / "shop" / "shop.py").read_text() == shipped
    assert len(shipped.splitlines()) <= 90


def test_commands_in_the_documents_exist() -> None:
    """Every `semel ...` that a page tells to type is a command with these options."""
    import click

    from semel.ops.cli import main

    for page in PAGES:
        for line in re.findall(r"^    (?:[A-Z_]+=\S+ )*(?:\.venv/bin/)?semel (.+)$", page.read_text(), re.MULTILINE):
            command: Any = main
            words = textwrap.dedent(line).split("#")[0].split()
            while words and isinstance(command, click.Group):
                name = words.pop(0)
                assert name in command.commands, f"{page.name}: semel {line}"
                command = command.commands[name]
            known = {option for item in command.params for option in item.opts}
            for word in words:
                if word.startswith("-"):
                    assert word.partition("=")[0] in known, f"{page.name}: semel {line}"


# --- What happens when something fails ---


def test_every_failure_in_the_guarantees_names_a_test_that_is_there() -> None:
    table = section(ROOT / "docs" / "guarantees.md", "When something fails")
    named = [cells[2].strip("`") for cells in rows(table) if cells[0] != "failure"]
    assert len(named) > 30
    missing = []
    for name in named:
        path, _, function = name.partition(": ")
        file = ROOT / "tests" / path
        if not file.exists() or f"def {function}(" not in file.read_text():
            missing.append(name)
    assert missing == []
