"""What docs/operations.md says of files and commands is so."""

import re

import pytest

from services.common.settings import setting_fields
from tests.deploy import compose, units
from tests.deploy.dockerfile import ROOT, VERSION

TEXT = (ROOT / "docs/operations.md").read_text()


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)#]+)\)", TEXT))
def test_links_lead_somewhere(link: str) -> None:
    assert (ROOT / "docs" / link).exists()


def test_what_it_installs_is_of_this_version_and_there() -> None:
    assert f"transformer_debugger-{VERSION}-py3-none-any.whl" in TEXT
    torch = re.search(r"^TORCH := (\S+)$", (ROOT / "Makefile").read_text(), re.M)
    assert torch is not None
    assert f"pip install {torch[1]}\n" in TEXT
    enabled = re.search(r"^systemctl enable --now (.+)$", TEXT, re.M)
    assert enabled is not None
    assert {f"{name}.service" for name in enabled[1].split()} == set(units.SERVICES)


def test_variables_are_settings_or_of_the_compose_file() -> None:
    settings = {each.metadata["variable"] for each in setting_fields()}
    of_the_client = {"TDB_TOKEN"}
    assert set(re.findall(r"TDB_[A-Z0-9_]+[A-Z0-9]", TEXT)) <= settings | of_the_client
    file = (ROOT / "docker-compose.yml").read_text()
    for name in ("INFERENCE_MEMORY", "MODELS_FOLDER"):
        assert f"${{{name}:-" in file
    assert "COMPOSE_PROFILES" in compose.template()
