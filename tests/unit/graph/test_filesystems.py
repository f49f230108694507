"""Addresses: what is refused in them, and what messages show of them."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from dngd.config import TrainConfig, address_of_run
from dngd.errors import UserError
from dngd.graph import import_tables
from dngd.graph.filesystems import address_of, explained, is_remote, list_files, locate, shown_address

WITH_SECRETS = ["s3://AKIA:sec/ret@bucket/key", "s3://AKIA:secret@bucket/key", "s3://secret@bucket/key"]
WITH_SECRETS += ["S3://AKIA:secret@bucket/key", "Gs:/AKIA:secret@bucket/key"]
RESOLVING = {"list": list_files, "locate": locate}


def check_sentence(text: str) -> None:
    assert "credentials before an @" in text
    assert not any(part in text for part in ("AKIA", "sec/ret", "secret@", "ret@", "sec/"))


@pytest.mark.parametrize("address", WITH_SECRETS)
@pytest.mark.parametrize("resolve", RESOLVING.values(), ids=RESOLVING)
def test_credentials_are_refused_and_not_repeated(resolve: object, address: str) -> None:
    assert callable(resolve)
    with pytest.raises(UserError) as refused:
        resolve(address)
    check_sentence(str(refused.value))


@pytest.mark.parametrize("address", WITH_SECRETS)
def test_importers_refuse_credentials(address: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as refused:
        import_tables(address, tmp_path / "out")
    check_sentence(str(refused.value))


@pytest.mark.parametrize("field", ["dataset", "run_dir"])
@pytest.mark.parametrize("address", WITH_SECRETS)
def test_configurations_refuse_credentials(address: str, field: str) -> None:
    with pytest.raises(UserError) as refused:
        TrainConfig(**{"dataset": "products-mini", field: address})
    check_sentence(str(refused.value))


@pytest.mark.parametrize(
    ("address", "variable", "named"),
    [
        ("s3://bucket/key", "http://key:secret@[::1", "AWS_ENDPOINT_URL"),
        ("s3://bucket/key?endpoint_override=http://secret[::1", "", "?endpoint_override="),
    ],
)
def test_an_endpoint_that_is_no_address(
    address: str, variable: str, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", variable)
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3", raising=False)
    with pytest.raises(UserError) as refused:
        locate(address)
    assert f"the endpoint in {named} is no address; write http://HOST:PORT" in str(refused.value)
    assert "secret" not in str(refused.value)


def test_a_pattern_in_place_of_the_bucket_shows_no_credentials() -> None:
    with pytest.raises(UserError, match="pattern in place of the bucket's name") as refused:
        list_files("s3://AKIA:secret@buck*/key")
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("s3://bucket/mail@host/part#1?region=eu-west-1", "s3://bucket/mail@host/part#1"),
        ("s3://bucket?region=eu-west-1", "s3://bucket"),
        ("s3://id@bucket/mail@host", "s3://bucket/mail@host"),
        ("s3://id:sec/ret@bucket/key", "s3://bucket/key"),
        ("s3://id:sec?ret@bucket/key", "s3://bucket/key"),
    ],
)
def test_what_messages_show(address: str, shown: str) -> None:
    assert shown_address(address) == shown


def test_keys_may_hold_an_at_sign() -> None:
    TrainConfig(dataset="s3://bucket/mail@host", run_dir=Path("s3://bucket/runs/mail@host"))
    assert locate("s3://bucket/mail@host?region=eu-west-1").path == "bucket/mail@host"


def test_what_a_file_system_does_not_understand_is_not_repeated() -> None:
    with pytest.raises(UserError, match=r"^s3://bucket/key is not understood") as refused, explained("s3://bucket/key"):
        raise pa.ArrowInvalid("Expected an S3 object path, got a URI: 's3://AKIA:secret@bucket'")
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize("address", ["S3://bucket/Key", "s3:/bucket/Key", Path("S3://bucket/Key")])
def test_schemes_have_no_case(address: str | Path) -> None:
    assert address_of(address) == "s3://bucket/Key"
    assert is_remote(address)
    config = TrainConfig(dataset="products-mini", run_dir=address)
    assert config.run_address == address_of_run(Path(address)) == "s3://bucket/Key"
    assert "run_dir: s3://bucket/Key\n" in config.to_yaml()


@pytest.mark.parametrize("place", ["HTTP://b/x", "http+x://b/x", "File:///tmp/x", "abfs.x:/b/x"])
def test_other_schemes_are_no_place_for_a_run(place: str) -> None:
    with pytest.raises(UserError, match="is no place for a run"):
        TrainConfig(dataset="products-mini", run_dir=place)


@pytest.mark.parametrize("folder", ["C:/x", "a/s3:/b", "s3", "s3:b"])
def test_paths_are_no_addresses(folder: str) -> None:
    assert TrainConfig(dataset="products-mini", run_dir=folder).run_address is None
