# SPDX-License-Identifier: Apache-2.0
"""A run on `s3://`, by the real protocol against a server on this machine."""

import pyarrow.dataset as ds
import pytest
from moto.server import ThreadedMotoServer
from pyarrow import fs as pafs

from jobs.sample import main
from streaminator import pool, session
from streaminator.data import files
from streaminator.run_output import RunOutput
from tests.programs import assert_refused

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


@pytest.fixture
def refuse(monkeypatch, capsys):
    """Asserts that the output is refused in one line, before a model is loaded."""

    def refused(output: str, words: str) -> None:
        monkeypatch.setattr(pool, "LocalPool", lambda _: pytest.fail("loaded"))
        monkeypatch.setattr("sys.argv", ["job", *FLAGS, "--output", output])
        assert_refused("job", main, capsys, words)

    return refused


def test_a_bucket_that_is_not_there_is_refused_before_a_model_is_loaded(s3, refuse):
    refuse(uri(s3[1], "nowhere"), "Bucket 'nowhere' not found")


def test_missing_credentials_are_refused_and_say_how_to_give_them(
    s3, refuse, monkeypatch, tmp_path
):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))  # no ~/.aws
    refuse(uri(s3[1]), "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")


def test_a_store_that_does_not_answer_is_refused(s3, refuse):
    refuse(uri("127.0.0.1:1"), "Could not connect")


def test_gs_that_does_not_answer_is_not_waited_for_a_quarter_of_an_hour(refuse, monkeypatch):
    monkeypatch.setattr(files, "_GS_PROBE_SECONDS", 1)
    refuse("gs://anonymous@bucket/runs?endpoint_override=127.0.0.1:1&scheme=http", "connect")


@pytest.mark.parametrize(
    ("output", "words"),
    [
        ("s3://bucket/runs?regoin=x", "Unexpected query parameter"),
        ("ftp://host/runs", "ftp://host/runs"),
        ("file:///dev/null/runs", "file:///dev/null/runs: cannot be written"),
    ],
)
def test_a_uri_that_means_nothing_is_refused(refuse, output, words):
    refuse(output, words)
