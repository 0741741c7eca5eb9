"""Shards in an S3 bucket, on a real server of that protocol on loopback."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from ddp_runs import IdModule, write_numbers
from moto.server import ThreadedMotoServer

from datamodules.errors import DataError
from datamodules.shards import remote as remote_module
from datamodules.shards.source import Source


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("s3")
    write_numbers(base / "train")
    return base


@pytest.fixture(scope="module")
def bucket(root: Path) -> Iterator[str]:
    """A bucket with the shards; its settings lie in the environment, as a user has them."""
    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "testing")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setattr(remote_module, "RANGE_BYTES", 4000)
        patch.setattr(remote_module, "PAUSES", (0.01,))
        client = boto3.client("s3")
        client.create_bucket(Bucket="shards")
        for path in (root / "train").iterdir():
            client.upload_file(path, "shards", f"numbers/train/{path.name}")
        yield "s3://shards/numbers"
    server.stop()


@pytest.mark.parametrize("workers", [0, 1])
def test_the_same_batches_as_from_a_folder(workers: int, bucket: str, root: Path, tmp_path: Path) -> None:
    options = {"num_workers": workers, "start_method": "fork" if workers else None}
    away = IdModule(bucket, 4, cache_dir=tmp_path, **options).train_dataloader()
    here = IdModule(root, 4).train_dataloader()
    assert [b["id"].tolist() for b in away] == [b["id"].tolist() for b in here]
    stored = {path.name.partition("-")[2]: path.read_bytes() for path in tmp_path.glob("*/*.tar")}
    assert stored == {path.name: path.read_bytes() for path in (root / "train").glob("*.tar")}


def test_what_is_not_there(bucket: str, tmp_path: Path) -> None:
    assert Source.open(f"{bucket}/val") is None
    found = Source.open(f"{bucket}/train", tmp_path)
    assert found is not None
    boto3.client("s3").delete_object(Bucket="shards", Key="numbers/train/numbers-007.tar")
    with pytest.raises(DataError, match=r"numbers-007\.tar is missing, the manifest there lists it"):
        found.locate("numbers-007.tar")


def test_no_credentials(
    bucket: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(DataError, match="your credentials"):
        Source.open(f"{bucket}/train")
    assert "again" not in caplog.text  # keys do not come by waiting
    s3fs.S3FileSystem.clear_instance_cache()
