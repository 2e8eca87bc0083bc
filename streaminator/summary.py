# SPDX-License-Identifier: Apache-2.0
"""What the closing table of a run says, computed from its Parquet with SQL.

Invariants
- Nothing comes from the memory of the process that sampled: a summary of a finished, a partial
  and an empty run is made the same way, at any time, also while the run is written.
- A figure without data is None, not 0. Completions that were not graded count in no accuracy.
- Where completions were not drawn because answers were settled, accuracy and pass@k count only those
  before the first such place of any prompt: later ones are of the harder prompts.

Used by: the command lines at the end of a run, `streaminator.wandb_log`.
"""

import re
import shlex
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs as pafs

from streaminator.data.files import join_uri, list_parts, reason, resolve
from streaminator.data.parquet import COMPLETIONS, EVENTS, STEPS
from streaminator.errors import OutputError
from streaminator.run_record import RunRecord, read_record

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

PHASES = ("schedule", "draft", "pack", "forward", "sample", "verify", "commit")
_MAX_REASONS = 3
_TABLES = {"completions": COMPLETIONS, "steps": STEPS, "events": EVENTS}

_IS_BEFORE_SETTLED = """sample_index < coalesce(
    (SELECT min(sample_index) FROM completions WHERE finish_reason = 'settled'), 2147483647)"""
_COMPLETIONS_SQL = f"""
    SELECT count(DISTINCT prompt_id), count(*), count(*) FILTER (finish_reason = 'failed'),
           coalesce(sum(num_completion_tokens), 0),
           count(is_correct) FILTER ({_IS_BEFORE_SETTLED}),
           avg(is_correct::INT) FILTER ({_IS_BEFORE_SETTLED})
    FROM completions"""
_SETTLED_SQL = """
    SELECT coalesce(sum(num_settled), 0), count(*) FILTER (num_settled > 0),
           sum(num_settled * mean_length) FROM (
        SELECT count(*) FILTER (finish_reason = 'settled') AS num_settled,
               avg(num_completion_tokens) FILTER (finish_reason IN ('stop', 'length'))
                   AS mean_length
        FROM completions GROUP BY prompt_id)"""
_REASONS_SQL = f"""
    SELECT coalesce(error, 'no reason recorded'), count(*) FROM completions
    WHERE finish_reason = 'failed' GROUP BY 1 ORDER BY 2 DESC, 1 LIMIT {_MAX_REASONS}"""
_GRADER_SQL = f"""
    SELECT grader_error, count(*) FROM completions
    WHERE grader_error IS NOT NULL GROUP BY 1 ORDER BY 2 DESC, 1 LIMIT {_MAX_REASONS}"""
_EVENTS_SQL = "SELECT kind, count(*) FROM events GROUP BY 1 ORDER BY 2 DESC, 1"
_ACCEPTANCE = "sum(num_accepted_tokens) / nullif(sum(num_draft_tokens), 0)"
_TOKENS_PER_STEP = "sum(num_completion_tokens) / nullif(sum(num_steps), 0)"
_GENERATIONS_SQL = f"""
    SELECT sample_index, count(*), {_ACCEPTANCE}, {_TOKENS_PER_STEP} FROM completions
    WHERE finish_reason IS DISTINCT FROM 'settled'
    GROUP BY GROUPING SETS ((sample_index), ()) ORDER BY sample_index NULLS LAST"""
_GRADED_SQL = f"""
    SELECT list(answer ORDER BY sample_index) FILTER (is_correct IS NOT NULL),
           list(is_correct ORDER BY sample_index) FILTER (is_correct IS NOT NULL),
           count(is_correct) FILTER ({_IS_BEFORE_SETTLED}),
           count(*) FILTER (is_correct IS NOT NULL OR finish_reason = 'settled')
    FROM completions GROUP BY prompt_id HAVING count(is_correct) > 0"""
_STEP_SECONDS = " + ".join(f"seconds_{phase}" for phase in PHASES)
_WALL_SQL = f"""
    SELECT sum(seconds) FROM (
        SELECT max(until) - min(since) AS seconds FROM (
            SELECT attempt, epoch(started_at) AS since, epoch(finished_at) AS until
            FROM completions
            UNION ALL
            SELECT attempt_id, epoch(time) - ({_STEP_SECONDS}), epoch(time) FROM steps)
        GROUP BY attempt)"""
# Steps of earlier versions do not tell their stream's width: it was as the attempt's settings say.
_WIDE_STEPS_SQL = """
    (SELECT * REPLACE (coalesce(stream_width, width) AS stream_width) FROM steps
     LEFT JOIN (SELECT unnest($attempts) AS attempt_id, unnest($widths) AS width) USING (attempt_id))"""
_WIDTHS_SQL = f"""
    SELECT DISTINCT stream_width FROM {_WIDE_STEPS_SQL} WHERE stream_width > 0 ORDER BY 1"""
_UTILIZATION_SQL = f"SELECT avg(num_running / stream_width) FROM {_WIDE_STEPS_SQL}"
# Of the forward, the prompts' part by tokens; of the rest, what full slots would not have needed.
_BOUNDS_SQL = f"""
    SELECT sum(seconds_forward * prefill) / sum(seconds),
           sum(seconds_forward * (1 - prefill) * (1 - running)) / sum(seconds) FROM (
        SELECT {_STEP_SECONDS} AS seconds, seconds_forward,
               least(num_running / stream_width, 1) AS running,
               num_prefill_tokens / nullif(num_prefill_tokens + num_decode_tokens
                                           + num_draft_tokens, 0) AS prefill
        FROM {_WIDE_STEPS_SQL})"""
_PHASES_SQL = f"""
    SELECT {", ".join(f"sum(seconds_{p}) / nullif(sum({_STEP_SECONDS}), 0)" for p in PHASES)}
    FROM steps"""

_CALIBRATION_SQL = """
    SELECT tenth, sum(drafted), sum(accepted) FROM (
        SELECT unnest(num_draft_by_survival) AS drafted,
               unnest(num_accepted_by_survival) AS accepted,
               generate_subscripts(num_draft_by_survival, 1) - 1 AS tenth
        FROM steps)
    GROUP BY tenth HAVING sum(drafted) > 0 ORDER BY tenth"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """The completions that were drawn n-th for their prompts."""

    sample_index: int
    num_completions: int
    acceptance_rate: float | None
    tokens_per_step: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """Drafted tokens whose stated chance of acceptance lay in one tenth."""

    from_chance: float
    """The tenth's lower end."""
    num_drafted: int
    num_accepted: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """What a run has produced so far."""

    path: str
    num_prompts: int
    num_completions: int
    """Failed ones included."""
    num_failed: int
    failures: dict[str, int]
    """The most frequent reasons, with how often each occurred."""
    events: dict[str, int]
    """What went wrong and was mended (a worker died, ...), with how often."""
    num_settled: int
    """Completions not drawn because the answers before them were settled."""
    num_settled_prompts: int
    num_tokens_saved: int
    """Estimate: a completion not drawn is as long as the mean of its prompt's others."""
    num_tokens: int
    wall_seconds: float
    """From first to last, summed over the attempts."""
    tokens_per_second: float | None
    num_graded: int
    """Failed completions count as wrong."""
    grader_errors: dict[str, int]
    """The most frequent reasons why a completion could not be graded."""
    accuracy: float | None
    pass_at_k: dict[int, float]
    majority_at_k: dict[int, float]
    acceptance_rate: float | None
    """Accepted / drafted tokens."""
    tokens_per_step: float | None
    generations: list[Generation]
    calibration: list[Calibration]
    """Of the drafts whose chance of acceptance the speculator stated."""
    stream_widths: list[int]
    """Slots of the streams, rising: workers may differ, and attempts, and memory may have run out."""
    stream_utilization: float | None
    """Mean of running slots / stream width over all steps."""
    phase_shares: dict[str, float]
    """Share of the step time spent in each phase."""
    bound_shares: dict[str, float]
    """The step time parted into prefill, tail (forwards' share of empty slots), overhead (all but
    the forward) and decode (the forward of slots in use)."""

    @property
    def query(self) -> str:
        """A shell command that asks DuckDB for the acceptance rate by generation."""
        path = self.path.partition("?")[0] if "://" in self.path else self.path
        folder = re.sub(r"([*?\[])", r"[\1]", path)
        files = join_uri(folder, "completions", "*.parquet")
        sql = (
            "SELECT sample_index, sum(num_accepted_tokens)/nullif(sum(num_draft_tokens), 0) AS acceptance "
            f"FROM '{files.replace(chr(39), chr(39) * 2)}' GROUP BY 1 ORDER BY 1"
        )
        is_plain = not set(sql) & set('"$`\\!')
        return f'{_duckdb()} -c "{sql}"' if is_plain else f"{_duckdb()} -c {shlex.quote(sql)}"

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        result = asdict(self)
        for name in ("pass_at_k", "majority_at_k"):
            result[name] = {str(k): value for k, value in result[name].items()}
        return result | {"query": self.query}


def summarise(run: str | Path) -> Summary:
    """Summarise the run in a folder or URI.

    Raises: OutputError when there is no run, or it cannot be read.
    """
    import duckdb

    filesystem, path = resolve(str(run))
    record = read_record(filesystem, path)
    tables = {name: list_parts(filesystem, f"{path}/{name}") for name in _TABLES}
    if record is None and not any(tables.values()):
        raise OutputError(f"{run}: no run here (neither run.json nor results)")
    for part in (*tables["steps"], *tables["events"]):
        _check_footer(filesystem, part)
    try:
        with duckdb.connect() as connection:
            for name, schema in _TABLES.items():
                _view(connection, name, filesystem, tables[name], schema)
            return _compute(connection, str(run) if "://" in str(run) else path, record)
    except (duckdb.Error, OSError, pa.ArrowException) as error:
        raise OutputError(f"{path}: cannot be summarised: {reason(error)}") from error


def _check_footer(filesystem: pafs.FileSystem, part: str) -> None:
    try:
        with filesystem.open_input_file(part) as file:
            pq.ParquetFile(file).close()
    except (OSError, pa.ArrowException) as error:
        raise OutputError(
            f"{part}: damaged ({reason(error)}); delete it and run the same command again: it holds "
            "statistics only"
        ) from error


def _view(
    connection: "DuckDBPyConnection",
    name: str,
    filesystem: pafs.FileSystem,
    parts: list[str],
    schema: pa.Schema,
) -> None:
    is_local = isinstance(filesystem, pafs.LocalFileSystem)
    if parts and is_local and not any(set(part) & set("*?[") for part in parts):
        files = ", ".join("'" + part.replace("'", "''") + "'" for part in parts)
        # Earlier versions' parts lack columns.
        connection.register(f"no_{name}", schema.empty_table())
        connection.execute(
            f"CREATE VIEW {name} AS FROM no_{name} UNION ALL BY NAME FROM "
            f"read_parquet([{files}], hive_partitioning = false, union_by_name = true)"
        )
    elif parts:
        # Late: it brings pandas, 45 MB that the driver does not need while it draws.
        import pyarrow.dataset as ds

        connection.register(name, ds.dataset(parts, format="parquet", filesystem=filesystem))
    else:
        connection.register(name, schema.empty_table())


def _compute(connection: "DuckDBPyConnection", path: str, record: RunRecord | None) -> Summary:
    def row(sql: str, parameters: object = None) -> tuple[Any, ...]:
        return connection.execute(sql, parameters).fetchall()[0]

    prompts, completions, failed, tokens, num_graded, accuracy = row(_COMPLETIONS_SQL)
    *generations, total = connection.execute(_GENERATIONS_SQL).fetchall()
    num_settled, num_settled_prompts, tokens_saved = row(_SETTLED_SQL)
    (wall,) = row(_WALL_SQL)
    widths = _widths_set(record)
    per_attempt = {"attempts": list(widths), "widths": list(widths.values())}
    (utilization,) = row(_UTILIZATION_SQL, per_attempt)
    used = connection.execute(_WIDTHS_SQL, per_attempt).fetchall()
    prefill, tail = row(_BOUNDS_SQL, per_attempt)
    shares: dict[str, float | None] = dict(zip(PHASES, row(_PHASES_SQL), strict=True))
    pass_at_k, majority_at_k = _at_k(connection.execute(_GRADED_SQL).fetchall())
    return Summary(
        path=path,
        num_prompts=prompts,
        num_completions=completions,
        num_failed=failed,
        failures=dict(connection.execute(_REASONS_SQL).fetchall()),
        events=dict(connection.execute(_EVENTS_SQL).fetchall()),
        num_settled=num_settled,
        num_settled_prompts=num_settled_prompts,
        num_tokens_saved=round(tokens_saved or 0),
        num_tokens=tokens,
        wall_seconds=wall or 0.0,
        tokens_per_second=tokens / wall if wall else None,
        num_graded=num_graded,
        grader_errors=dict(connection.execute(_GRADER_SQL).fetchall()),
        accuracy=accuracy,
        pass_at_k=pass_at_k,
        majority_at_k=majority_at_k,
        acceptance_rate=total[2],
        tokens_per_step=total[3],
        generations=[
            Generation(
                sample_index=index,
                num_completions=count,
                acceptance_rate=acceptance,
                tokens_per_step=tokens_per_step,
            )
            for index, count, acceptance, tokens_per_step in generations
        ],
        calibration=[
            Calibration(from_chance=tenth / 10, num_drafted=drafted, num_accepted=accepted)
            for tenth, drafted, accepted in connection.execute(_CALIBRATION_SQL).fetchall()
        ],
        stream_widths=[width for (width,) in used],
        stream_utilization=utilization,
        phase_shares={name: share for name, share in shares.items() if share is not None},
        bound_shares=_bounds(shares, prefill, tail),
    )


def _bounds(
    shares: dict[str, float | None], prefill: float | None, tail: float | None
) -> dict[str, float]:
    forward = shares["forward"]
    if forward is None or prefill is None or tail is None:
        return {}
    decode = max(forward - prefill - tail, 0.0)
    return {"decode": decode, "prefill": prefill, "tail": tail, "overhead": 1 - forward}


def _widths_set(record: RunRecord | None) -> dict[int, int]:
    """By attempt; 0 where it was left to the program."""
    attempts = record.attempts if record else []
    return {a["attempt"]: a["settings"].get("stream_width") or 0 for a in attempts}


def _at_k(graded: list[tuple[list[str | None], list[bool], int, int]]) -> tuple[dict, dict]:
    """From per prompt: answers, verdicts, how many of them pass@k may count, and how many of them
    there would be if none had been left out as settled: the majority of those stands for all.
    """
    if not graded:
        return {}, {}
    from streaminator.grading import majority_at_k, pass_at_k

    most = max(num for *_, num in graded)
    passed, majority = {}, {}
    for k in sorted({2**i for i in range(most.bit_length())} | {most}):
        counted = [correct[:num] for _, correct, num, _ in graded if num >= k]
        if counted:
            passed[k] = sum(pass_at_k(len(c), sum(c), k) for c in counted) / len(counted)
        enough = [(answers, correct) for answers, correct, _, num in graded if num >= k]
        if any(answer is not None for answers, _ in enough for answer in answers):
            right = [majority_at_k(a, c, min(k, len(c))) for a, c in enough]
            majority[k] = sum(right) / len(right)
    return passed, majority


def _duckdb() -> str:
    """The DuckDB command line: on the path, or installed beside this interpreter."""
    beside = Path(sys.executable).parent / "duckdb"
    return "duckdb" if shutil.which("duckdb") or not beside.exists() else str(beside)
