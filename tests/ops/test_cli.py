"""The command line as a contract: exit codes, one line for an error, JSON on every listing, help that teaches."""

from __future__ import annotations

import click
import pytest
from click.testing import CliRunner

from semel.errors import ConfigurationError, Fatal, Fenced, Retriable
from semel.ops import cli


def commands(group: click.Group, prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found = []
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            found += commands(command, (*prefix, name))
        else:
            found.append((*prefix, name))
    return found


def test_every_listing_can_be_read_by_programs() -> None:
    listings = [
        ("guarantees",),
        ("topics",),
        ("txn", "list"),
        ("txn", "prepared"),
        ("park", "list"),
        ("state", "get"),
        ("demo",),
    ]
    assert set(listings) <= set(commands(cli.main))
    for listing in listings:
        assert "--format [text|json]" in CliRunner().invoke(cli.main, [*listing, "--help"]).output


def test_help_teaches_the_terms() -> None:
    text = CliRunner().invoke(cli.main, ["--help"]).output
    for term in ("transaction ", "transactional id", "fence", "position", "park"):
        assert term in text
    assert "PrepareCommit" in CliRunner().invoke(cli.main, ["txn", "--help"]).output
    for command in commands(cli.main):
        output = CliRunner().invoke(cli.main, [*command, "--help"])
        assert output.exit_code == 0
        assert output.output.strip()


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (Retriable("no broker answers"), 1),
        (Fatal("the disk is full"), 1),
        (ConfigurationError("SEMEL_PARTITIONS must be greater than 0."), 2),
        (Fenced("another process has this id"), 75),
    ],
)
def test_an_error_is_one_line_and_an_exit_code(error: Exception, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(cli, "need_kafka", fail)
    result = CliRunner().invoke(cli.main, ["topics"])
    assert result.exit_code == code
    assert result.stderr == f"semel: {error}\n"
    assert result.stdout == ""


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(cli, "need_kafka", fail)
    assert isinstance(CliRunner().invoke(cli.main, ["topics"]).exception, ZeroDivisionError)


def test_migrate_prints_statements_or_runs_them(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("migrate")
    url = f"sqlite:///{folder / 'shop.db'}"
    printed = CliRunner().invoke(cli.main, ["migrate", url, "--sql"])
    assert printed.exit_code == 0
    assert "CREATE TABLE" in printed.stdout
    assert not (folder / "shop.db").exists(), "--sql only prints"
    for _ in range(2):
        assert CliRunner().invoke(cli.main, ["migrate", url]).exit_code == 0
    assert (folder / "shop.db").exists()


def test_listings_do_not_make_the_database_they_look_into(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("park")
    (folder / "parked_app.py").write_text(
        "import msgspec\n"
        "from semel import App\n"
        'app = App("parked")\n'
        'items = app.topic("items", value=dict)\n'
        f'database = app.database("sqlite:///{folder / "none.db"}")\n'
        "@app.sink(items, database)\n"
        "def rows(records, db):\n"
        "    pass\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        result = CliRunner().invoke(cli.main, ["park", "list", "parked_app:app", "--format", "json"])
    assert (result.exit_code, result.stdout) == (0, "[]\n"), result.stderr
    assert not (folder / "none.db").exists()
