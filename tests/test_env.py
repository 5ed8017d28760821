import json
import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

from selfplay.commands import env


@pytest.fixture
def app() -> typer.Typer:
    made = typer.Typer()
    made.command("env")(env.env_command)
    return made


def test_json_holds_every_fact_and_text_shows_the_same(app: typer.Typer) -> None:
    facts = json.loads(CliRunner().invoke(app, ["--json"]).stdout)
    assert facts["versions"]["transformers"].startswith("5.")
    assert facts["cpus"] >= 1
    assert facts["disk_free_gib"] > 0
    text = CliRunner().invoke(app, []).stdout
    for name, version in facts["versions"].items():
        assert f"{name}: {version}\n" in text


def test_a_package_that_is_missing_is_said_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(env, "ENGINES", ("no-such-engine",))
    assert env.collect()["versions"]["vllm"] == "not installed"


def test_settings_are_shown_and_secrets_never(app: typer.Typer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", "/somewhere/[bold]else")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    for arguments in ([], ["--json"]):
        shown = CliRunner().invoke(app, arguments).stdout
        assert "/somewhere/[bold]else/hub" in shown
        assert "hf_secret" not in shown


def test_importing_the_command_loads_no_torch() -> None:
    code = "import sys; import selfplay.commands.env; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
