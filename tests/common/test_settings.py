"""Settings: every refusal is one sentence with the variable's name, and the docs agree."""

import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from services.common import settings_text
from services.common.cache.redis_url import RedisUrl
from services.common.settings import (
    DictionarySource,
    ModelSource,
    Settings,
    SettingsError,
    is_loopback,
    setting_fields,
)


def read(**variables: str) -> Settings:
    return Settings.from_env(variables)


def test_defaults() -> None:
    settings = read(XDG_DATA_HOME="/somewhere")
    assert settings.models == ()
    assert settings.tokenizer is None
    assert (settings.gateway_port, settings.inference_port) == (8080, 50051)
    assert settings.dataset_target == "127.0.0.1:50052"
    assert settings.explainer_target == "127.0.0.1:50053"
    assert settings.inference_target == "127.0.0.1:50051"
    assert settings.data_dir == Path("/somewhere/tdb")
    assert read().data_dir == Path.home() / ".local/share/tdb"
    assert not settings.tokens
    assert not settings.reflection
    assert not settings.log_prompts


def test_an_empty_variable_counts_as_absent() -> None:
    assert read(TDB_HOST="", TDB_GATEWAY_PORT=" ") == read()


def test_models_take_the_name_given_or_their_own(tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    folder.mkdir()
    settings = read(TDB_MODEL=f"gpt2, org/model,{folder},mine={folder}", TDB_TOKENIZER=str(folder))
    assert settings.models == (
        ModelSource("gpt2", "gpt2"),
        ModelSource("org/model", "org/model"),
        ModelSource("tiny", str(folder)),
        ModelSource("mine", str(folder)),
    )
    assert settings.tokenizer == str(folder)


def test_dictionaries_are_paths_or_hub_uris(tmp_path: Path) -> None:
    settings = read(
        TDB_DICTIONARIES=f"a={tmp_path}#site=mlp_out.3,unchecked, b.2=hf://org/repo/x/y.pt@v1.0,"
        "c=org/repo,unchecked"
    )
    assert settings.dictionaries == (
        DictionarySource("a", f"{tmp_path}#site=mlp_out.3", unchecked=True),
        DictionarySource("b.2", "hf://org/repo/x/y.pt@v1.0", unchecked=False),
        DictionarySource("c", "org/repo", unchecked=True),
    )
    assert read().dictionaries == ()


def test_a_path_of_a_dictionary_is_made_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "0.pt").touch()
    monkeypatch.chdir(tmp_path)
    (source,) = read(TDB_DICTIONARIES="a=./0.pt").dictionaries
    assert source.uri == str(tmp_path / "0.pt")
    line = next(
        line
        for line in settings_text.as_lines(read(TDB_DICTIONARIES="a=./0.pt,unchecked"), {})
        if line.startswith("TDB_DICTIONARIES=")
    )
    assert line == f"TDB_DICTIONARIES=a={tmp_path}/0.pt,unchecked  # default"


@pytest.mark.parametrize(
    ("variable", "value", "says"),
    [
        ("TDB_GATEWAY_PORT", "80a", "must be a port from 0 to 65535, not '80a'"),
        ("TDB_INFERENCE_PORT", "65536", "must be a port"),
        ("TDB_INFERENCE_PORT", "-1", "must be a port"),
        ("TDB_HOST", "not a host", "must be a host name or address"),
        ("TDB_HOST", "0.0.0.0", "set TDB_TOKENS as well"),
        ("TDB_HOST", "gpu-box", "set TDB_TOKENS as well"),
        ("TDB_HOST", "::", "set TDB_TOKENS as well"),
        ("TDB_HOST", "fe80::1", "set TDB_TOKENS as well"),
        ("TDB_HOST", "localhost.example", "set TDB_TOKENS as well"),
        ("TDB_HOST", "127.1", "set TDB_TOKENS as well"),
        ("TDB_TRUSTED_PROXIES", "proxy", "must be addresses or networks such as 10.0.0.5"),
        ("TDB_TRUSTED_PROXIES", "0.0.0.0/0", "must not be everybody"),
        ("TDB_TRUSTED_GATEWAYS", "10.0.0.1/8", "must be addresses or networks"),
        ("TDB_USER_HEADER", "x user", "must be the name of a header, not 'x user'"),
        ("TDB_INFERENCE_ADDRESS", "gpu-box", "must be host:port"),
        ("TDB_MODEL", "/no/such/folder", "names a folder that does not exist: /no/such/folder"),
        ("TDB_MODEL", "a b", "must be a Hub id or an existing folder, not 'a b'"),
        ("TDB_MODEL", "gpt2,gpt2", "serves two models as 'gpt2'"),
        ("TDB_TOKENIZER", "./nowhere", "names a folder that does not exist"),
        ("TDB_DICTIONARIES", "org/repo", "must be NAME=URI or NAME=URI,unchecked entries"),
        ("TDB_DICTIONARIES", "unchecked", "entries, not 'unchecked'"),
        ("TDB_DICTIONARIES", "a=org/r,unchecked,unchecked", "entries, not 'unchecked'"),
        ("TDB_DICTIONARIES", "a b=org/repo", "entries, not 'a b=org/repo'"),
        ("TDB_DICTIONARIES", "a=org/r,a=org/s", "names two dictionaries 'a'"),
        ("TDB_DICTIONARIES", "a=/no/such/file", "names a path that does not exist: /no/such/file"),
        ("TDB_DICTIONARIES", "a=", "must name existing paths or hf://org/repo/path"),
        ("TDB_DICTIONARIES", "a=word", "must name existing paths or hf://org/repo/path"),
        ("TDB_DICTIONARIES", "a=https://x/y", "must name existing paths or hf://org/repo/path"),
        ("TDB_DTYPE", "fp8", "must be one of float32, bfloat16, float16, not 'fp8'"),
        ("TDB_LOG_LEVEL", "loud", "must be one of debug, info, warning, error, not 'loud'"),
        ("TDB_LOG_PROMPTS", "yes", "must be 0 or 1, not 'yes'"),
        ("TDB_DRAIN_SECONDS", "soon", "must be a number of seconds"),
        ("TDB_DATA_DIR", __file__, "must be a folder"),
        ("TDB_CACHE_MIB", "-1", "must be a number of MiB"),
        ("TDB_ACTIVATION_MIB", "0", "must be a number of MiB"),
        ("TDB_ACTIVATION_MIB", "most", "must be a number of MiB"),
        ("TDB_REDIS_URL", "localhost:6379", "must begin with redis:// or, for TLS, rediss://"),
        ("TDB_REDIS_URL", "redis://:6379", "names no host"),
        ("TDB_REDIS_URL", "redis://h/one", "must end in the number of a database"),
        ("TDB_REDIS_URL", "redis://h?socket_timeout=9", "has a ? or # part, which is not read"),
        ("TDB_REDIS_URL", "redis://h:port", "is not a URL"),
        ("TDB_DATASET_ADDRESS", "gpu-box", "must be host:port"),
        ("TDB_EXPLAINER_ADDRESS", "gpu-box", "must be host:port"),
        ("TDB_EXPLANATIONS_MIB", "0", "must be a number of MiB"),
        ("TDB_EMBEDDING_URL", "http://x/v1?key=hush", "must be a plain URL"),
        ("TDB_PROVIDER_URL", "http://[x/v1", "must be an http or https URL"),
        ("TDB_PROVIDER_KEY", "a key", "must be a token: visible ASCII"),
        ("TDB_PROVIDER_PRICES", "1,inf", "must be PROMPT,COMPLETION in dollars"),
        ("TDB_REMOTE_DATASETS", "far", "must give far a URL"),
        ("TDB_REMOTE_DATASETS", "a b=https://h/x", "must be NAME=URL entries, not 'a b=https"),
        ("TDB_REMOTE_DATASETS", "a=https://h/x,a=https://h/y", "names two datasets 'a'"),
        ("TDB_REMOTE_DATASETS", "a=http://h/x", "must give a an https URL"),
        ("TDB_REMOTE_DATASETS", "a=https://me:pw@h/x", "a URL of a host and a path"),
        ("TDB_REMOTE_DATASETS", "a=https://h/x#y", "a URL of a host and a path"),
        ("TDB_IMPORT_SOURCES", "far=relative/x", "must give far a folder from the root or a URL"),
        ("TDB_IMPORT_SOURCES", "far=http://h/x", "an https URL"),
        ("TDB_IMPORT_SOURCES", "far=https://h/x?sig=a", "a URL without a query"),
        ("TDB_IMPORT_SOURCES", "a=/x,a=/y", "names two places 'a'"),
        ("TDB_IMPORT_SOURCES", "../x=/x", "must be NAME=FOLDER or NAME=URL entries"),
        ("TDB_OPENAI_RECORDS", "http://h/x", "must be an https URL"),
        ("TDB_OPENAI_RECORDS", "https://h/x?sig=hush", "must be a URL without a query"),
        ("TDB_OPENAI_RECORDS", "file:///etc", "must be a URL of a host and a path"),
        ("TDB_DATASET_CACHE_MIB", "0", "must be a number of MiB"),
        ("TDB_TOKEN", "ann:x", "TDB_TOKEN is not a setting: did you mean TDB_TOKENS?"),
    ],
)
def test_what_cannot_be_right_is_one_sentence(variable: str, value: str, says: str) -> None:
    with pytest.raises(SettingsError) as caught:
        read(**{variable: value})
    message = str(caught.value)
    assert message.startswith(variable)
    assert says in message
    assert message.endswith((".", "?"))
    assert "\n" not in message


def test_dictionaries_need_float32() -> None:
    assert read().data_type == "float32"
    with pytest.raises(SettingsError, match="TDB_DTYPE is bfloat16, but dictionaries need float32"):
        read(TDB_DTYPE="bfloat16", TDB_DICTIONARIES="a=org/repo")
    assert read(TDB_DTYPE="bfloat16").data_type == "bfloat16"


def test_variables_that_are_nobody_s_are_left_alone() -> None:
    assert read(TDB_SERVICE_HOST="10.0.0.1", TDB_REDIS_URL="", OTHER="x") == read()


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_loopback(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "gpu-box"])
def test_not_loopback(host: str) -> None:
    assert not is_loopback(host)


def test_a_host_that_others_reach_works_with_tokens() -> None:
    settings = read(TDB_HOST="0.0.0.0", TDB_TOKENS="ann:t0ken")
    assert settings.inference_target == "127.0.0.1:50051"
    assert read(TDB_HOST="::1").inference_target == "[::1]:50051"


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.7", "gpu-box"])
def test_a_host_that_others_reach_needs_to_know_who_calls(host: str) -> None:
    for variable, value in (
        ("TDB_TOKENS", "ann:t0ken"),
        ("TDB_TRUSTED_PROXIES", "10.0.0.5"),
        ("TDB_TRUSTED_GATEWAYS", "10.0.0.9"),
    ):
        settings = read(**{"TDB_HOST": host, variable: value})
        assert settings.host == host
        if variable == "TDB_TRUSTED_GATEWAYS":  # says nothing about who reaches a gateway
            with pytest.raises(SettingsError, match="the gateway needs TDB_TOKENS"):
                settings.check_gateway()
        else:
            settings.check_gateway()


def test_keys_of_language_models_are_not_shown() -> None:
    env = {
        "TDB_PROVIDER_URL": "http://llm:8000/v1/",
        "TDB_PROVIDER_MODEL": "judge",
        "TDB_PROVIDER_KEY": "sk-hush",
        "TDB_PROVIDER_PRICES": "0.15, 0.6",
        "TDB_EMBEDDING_URL": "https://llm/v1",
        "TDB_EMBEDDING_MODEL": "vectors",
        "TDB_EMBEDDING_KEY": "sk-hush",
    }
    settings = Settings.from_env(env)
    assert settings.provider_url == "http://llm:8000/v1"
    assert settings.provider_prices == (0.15, 0.6)
    assert read().provider_prices is None
    lines = settings_text.as_lines(settings, env)
    assert "TDB_PROVIDER_KEY=(secret)  # environment" in lines
    assert "TDB_PROVIDER_PRICES=0.15,0.6  # environment" in lines
    assert "hush" not in repr(settings) + "\n".join(lines)


@pytest.mark.parametrize(
    ("given", "other"),
    [
        ("TDB_PROVIDER_MODEL", "TDB_PROVIDER_URL"),
        ("TDB_PROVIDER_KEY", "TDB_PROVIDER_URL"),
        ("TDB_EMBEDDING_MODEL", "TDB_EMBEDDING_URL"),
        ("TDB_EMBEDDING_KEY", "TDB_EMBEDDING_URL"),
    ],
)
def test_a_setting_that_means_nothing_without_another_is_refused(given: str, other: str) -> None:
    with pytest.raises(SettingsError, match=f"{given} is set and {other} is not"):
        read(**{given: "hush"})


def test_tokens_come_from_a_list_or_a_file(tmp_path: Path) -> None:
    listed = read(TDB_TOKENS="ann:one, bob:two:three").tokens
    file = tmp_path / "tokens"
    file.write_text("# the team\nann:one\n\nbob:two:three  # his\n")
    assert read(TDB_TOKENS=str(file)).tokens == listed
    assert listed.user_of("Bearer two:three") == "bob"
    assert listed.user_of("Bearer two") is None
    assert listed.user_of("one") is None


@pytest.mark.parametrize("value", ["hush", "ann:", ":hush", "ann hush", "ann:hush,bob:hush"])
def test_no_token_is_ever_shown(value: str) -> None:
    with pytest.raises(SettingsError) as caught:
        read(TDB_TOKENS=value)
    assert str(caught.value).startswith("TDB_TOKENS")
    assert "hush" not in str(caught.value)


def test_the_settings_and_their_printed_form_hide_tokens() -> None:
    env = {"TDB_TOKENS": "ann:hush", "TDB_GATEWAY_PORT": "9"}
    settings = Settings.from_env(env)
    lines = settings_text.as_lines(settings, env)
    assert "hush" not in repr(settings)
    assert "hush" not in "\n".join(lines)
    assert "TDB_TOKENS=(tokens of ann)  # environment" in lines
    assert "TDB_GATEWAY_PORT=9  # environment" in lines
    assert "TDB_HOST=127.0.0.1  # default" in lines


def test_memory_for_passes_is_measured_unless_it_is_given() -> None:
    assert read().activation_bytes is None
    assert read(TDB_ACTIVATION_MIB="auto").activation_bytes is None
    assert read(TDB_ACTIVATION_MIB="3").activation_bytes == 3 * 2**20


def test_redis_is_a_url_with_or_without_a_password() -> None:
    assert read().redis is None
    assert read(TDB_REDIS_URL="redis://box").redis == RedisUrl("box", 6379, 0, False, "", "")
    full = read(TDB_REDIS_URL="rediss://ann:p%40ss%2F@[::1]:7000/3").redis
    assert full == RedisUrl("::1", 7000, 3, True, "ann", "p@ss/")
    assert read(TDB_CACHE_MIB="0").cache_bytes == 0
    assert read(TDB_CACHE_MIB="2").cache_bytes == 2 * 2**20


@pytest.mark.parametrize(
    "value",
    [
        "redis://:hush@h?x=hush",
        "redis://:hush@h/hush",
        "redis://:hush@",
        "redis://:hush@[x",
        "redis://u:hush@h:port",
        "http://:hush@h",
        "hush",
    ],
)
def test_no_password_of_redis_is_ever_shown(value: str) -> None:
    with pytest.raises(SettingsError) as caught:
        read(TDB_REDIS_URL=value)
    assert str(caught.value).startswith("TDB_REDIS_URL")
    assert "hush" not in str(caught.value)


def test_the_settings_and_their_printed_form_hide_the_password_of_redis() -> None:
    env = {"TDB_REDIS_URL": "redis://user:hush@box:7000/2"}
    settings = Settings.from_env(env)
    assert "hush" not in repr(settings)
    lines = settings_text.as_lines(settings, env)
    assert "TDB_REDIS_URL=redis://***@box:7000/2  # environment" in lines
    assert "hush" not in "\n".join(lines)


def test_mebibytes_are_printed_as_they_are_set() -> None:
    env = {"TDB_DICTIONARY_MIB": "7"}
    lines = settings_text.as_lines(Settings.from_env(env), env)
    assert "TDB_DICTIONARY_MIB=7  # environment" in lines
    assert "TDB_CACHE_MIB=256  # default" in lines


def test_the_query_of_a_remote_dataset_is_not_shown() -> None:
    env = {"TDB_REMOTE_DATASETS": "far=https://host/far?sig=hush,near=http://127.0.0.1:1/x"}
    settings = Settings.from_env(env)
    assert [each.url for each in settings.remote_datasets] == [
        "https://host/far?sig=hush",
        "http://127.0.0.1:1/x",
    ]
    assert "hush" not in repr(settings)
    lines = settings_text.as_lines(settings, env)
    assert (
        "TDB_REMOTE_DATASETS=far=https://host/far,near=http://127.0.0.1:1/x  # environment" in lines
    )


def test_the_data_folder_is_private(tmp_path: Path) -> None:
    settings = read(TDB_DATA_DIR=str(tmp_path / "deep" / "data"))
    assert not settings.data_dir.exists()
    logs = settings.folder("logs")
    assert logs.is_dir()
    assert stat.S_IMODE(settings.data_dir.stat().st_mode) == 0o700
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingsError, match="cannot create"):
        read(TDB_DATA_DIR=str(tmp_path / "file" / "below")).folder("logs")


def test_the_page_agrees_with_the_settings() -> None:
    page = settings_text.PAGE.read_text()
    assert page == settings_text.as_page(), "run python -m services.common.settings_text"
    headings = re.findall(r"^## (.+)$", page, re.MULTILINE)
    assert headings == [field.metadata["variable"] for field in setting_fields()]


def test_settings_and_server_load_without_torch() -> None:
    program = (
        "import sys, services.common.server, gateway.app, tdb.cli; print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr
