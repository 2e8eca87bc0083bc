# SPDX-License-Identifier: Apache-2.0
"""A run's series and closing table on Weights & Biases.

Invariants
- wandb is imported when a `WandbLog` is made, never otherwise.
- Nothing ever prompts: without a login and not offline, making a `WandbLog` fails.
- A resumed run continues the series of the same run id.

Used by: the driver, with `--use_wandb`.
"""

import re
import time
from typing import Any

from streaminator.config import JobConfig
from streaminator.errors import ConfigError
from streaminator.progress import Report
from streaminator.summary import Summary

_SECONDS_PER_POINT = 1.0


class WandbLog:
    """Logs reports as series, at most a point a second, and the summary at the end."""

    def __init__(self, config: JobConfig, run_id: str) -> None:
        """Raises: ConfigError when wandb is missing, is not logged in or refuses the run."""
        wandb = _import_wandb()
        self._table = wandb.Table
        try:
            settings = wandb.setup().settings
            if settings.mode not in ("offline", "dryrun", "disabled") and not wandb.login(
                prompt=False, verify=False
            ):
                raise ConfigError(
                    "--use_wandb: no login; run `wandb login`, or set WANDB_MODE=offline"
                )
            self._run = wandb.init(
                project=config.run.wandb_project,
                name=run_id,
                id=re.sub(r"[^A-Za-z0-9._-]", "-", run_id)[:64],
                resume="allow",
                config=config.flat(),
            )
        except wandb.Error as error:
            message = str(error).splitlines()[0]
            raise ConfigError(
                f"--use_wandb: {message}; WANDB_MODE=offline works without an account"
            ) from error
        self._sum = Report()
        self._pending = Report()
        self._last_point = time.monotonic()

    def log(self, report: Report) -> None:
        """Add a report to the series."""
        self._pending += report
        if time.monotonic() - self._last_point >= _SECONDS_PER_POINT:
            self._write_point()

    def finish(self, summary: Summary | None = None) -> None:
        """Write what is pending and the closing table, and end the run."""
        if self._pending != Report():
            self._write_point()
        if summary is not None:
            self._run.summary.update(_flat_summary(summary))
            table = self._table(
                columns=["generation", "acceptance_rate", "tokens_per_step"],
                data=[
                    [g.sample_index + 1, g.acceptance_rate, g.tokens_per_step]
                    for g in summary.generations
                ],
            )
            self._run.log({"acceptance_by_generation": table})
        self._run.finish()

    def _write_point(self) -> None:
        now = time.monotonic()
        pending, self._pending = self._pending, Report()
        self._sum += pending
        point = {
            "step": self._sum.num_steps,
            "completions": self._sum.num_finished + self._sum.num_failed,
            "tokens_per_second": pending.num_new_tokens / max(now - self._last_point, 1e-9),
            "device_memory": pending.device_memory,
            "acceptance_rate": pending.acceptance_rate,
            "stream_utilization": pending.stream_utilization,
        }
        self._last_point = now
        self._run.log({name: value for name, value in point.items() if value is not None})


def _import_wandb() -> Any:
    try:
        import wandb

        # A leftover folder `wandb/` is importable too, as an empty package.
        wandb.init  # noqa: B018
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            "--use_wandb: wandb is not installed; pip install 'streaminator[wandb]'"
        ) from error
    return wandb


def _flat_summary(summary: Summary) -> dict[str, Any]:
    values: dict[str, Any] = {f"pass@{k}": value for k, value in summary.pass_at_k.items()}
    values |= {f"majority@{k}": value for k, value in summary.majority_at_k.items()}
    values |= {f"share_{phase}": value for phase, value in summary.phase_shares.items()}
    for name, value in summary.to_dict().items():
        if isinstance(value, int | float | str) and name not in ("path", "query"):
            values[name] = value
    return values
