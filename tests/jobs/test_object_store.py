# SPDX-License-Identifier: Apache-2.0
"""A run on `s3://`, by the real protocol against a server on this machine."""

import pyarrow.dataset as ds
import pytest
from moto.server import ThreadedMotoServer
from pyarrow import fs as pafs

from jobs.sample import main
from streaminator import pool, session
from streaminator.errors import ConfigError
from streaminator.run_output import RunOutput

FLAGS = ["--num_samples", "4", "--num_completions", "2", "--max_length", "16"]
FLAGS += ["--num_workers", "0", "--no_spec_decoding", "--stream_width", "1"]


@pytest.fixture
def s3(monkeypatch):
    """(file system, `HOST:PORT`) of an S3 that has one bucket."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    place = f"127.0.0.1:{server.get_host_and_port()[1]}"
    store = pafs.S3FileSystem(
        endpoint_override=place, scheme="http", region="us-east-1", allow_bucket_creation=True
    )
    store.create_dir("bucket")
    yield store, place
    server.stop()


def uri(place: str, bucket: str = "bucket") -> str:
    return f"s3://{bucket}/runs?endpoint_override={place}&scheme=http&region=us-east-1"


def rows(store: pafs.FileSystem) -> list[tuple]:
    table = ds.dataset("bucket/runs/r/completions", filesystem=store, format="parquet").to_table(
        columns=["prompt_id", "sample_index", "text"]
    )
    return sorted(tuple(row.values()) for row in table.to_pylist())


def test_a_run_on_s3_is_read_while_written_interrupted_and_resumed(s3, monkeypatch, capsys):
    store, place = s3
    command = [*FLAGS, "--output", uri(place), "--run_id", "r"]
    publish, seen = RunOutput.publish, []

    def interrupt(self, part):
        publish(self, part)
        seen.append(len(rows(store)))
        if len(seen) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(session, "_PART_SECONDS", 0)
        patch.setattr(RunOutput, "publish", interrupt)
        with pytest.raises(KeyboardInterrupt):
            main(command)
    before = rows(store)
    assert 0 < seen[0] < seen[1] <= len(before) < 8
    assert main(command) == 0
    captured = capsys.readouterr()
    assert f"{len(before)} of them there already" in captured.err
    assert "pass@2" in captured.out
    after = rows(store)
    assert len({row[:2] for row in after}) == len(after) == 8
    assert set(before) <= set(after)


def test_a_bucket_that_is_not_there_is_refused_before_a_model_is_loaded(s3, monkeypatch):
    monkeypatch.setattr(pool, "LocalPool", lambda _: pytest.fail("loaded"))
    with pytest.raises(ConfigError, match="--output s3://nowhere/runs") as refused:
        main([*FLAGS, "--output", uri(s3[1], "nowhere")])
    assert "\n" not in str(refused.value)
