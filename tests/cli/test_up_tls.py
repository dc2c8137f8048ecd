"""`tdb up` whose parts speak TLS with each other."""

import urllib.request
from pathlib import Path

import pytest

from tests.cli.helpers import Up, tdb
from tests.cli.test_up import ATTRIBUTE, REQUEST, model, post
from tests.common.certificates import CLIENT, Authority

__all__ = ["model"]


def variables(authority: Authority, *, hosts: tuple[str, ...] = ("gpu-box",)) -> dict[str, str]:
    service = authority.pair("service", hosts=hosts)
    gateway = authority.pair("gateway", usage=CLIENT)
    return {
        "TDB_TLS_CERT": service.cert,
        "TDB_TLS_KEY": service.key,
        "TDB_TLS_CLIENT_CA": authority.path,
        "TDB_TLS_CA": authority.path,
        "TDB_TLS_CLIENT_CERT": gateway.cert,
        "TDB_TLS_CLIENT_KEY": gateway.key,
    }


def test_mutual_tls_from_start_to_an_answer(model: Path, tmp_path: Path) -> None:
    found = variables(Authority(tmp_path))
    with Up(tdb("up", "--model", str(model)), tmp_path, **found, TDB_TLS_NAME="gpu-box") as up:
        url = up.url()
        assert len(post(f"{url}/{ATTRIBUTE}", REQUEST)["rows"]) == 3
        with urllib.request.urlopen(f"{url}/readyz", timeout=5) as response:
            assert response.status == 200
        assert up.stop() == 0


@pytest.mark.parametrize(
    ("without", "says"),
    [
        ("TDB_TLS_NAME", "not valid for '127.0.0.1' (TDB_TLS_NAME"),
        ("TDB_TLS_CA", "TDB_TLS_CLIENT_CERT is set and TDB_TLS_CA is not"),
        ("TDB_TLS_KEY", "TDB_TLS_CERT is set and TDB_TLS_KEY is not"),
    ],
)
def test_what_does_not_fit_is_one_sentence(without: str, says: str, tmp_path: Path) -> None:
    found = {**variables(Authority(tmp_path)), "TDB_TLS_NAME": "gpu-box"}
    del found[without]
    with Up(tdb("up", "--model", str(tmp_path)), tmp_path, **found) as up:
        assert up.end() == 1
    assert says in up.errors[-1]
    assert len(up.errors) == 1
    assert up.out.empty()
