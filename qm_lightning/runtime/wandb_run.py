"""The W&B run of a training: never a prompt, never a hang, the same run after every resume."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from qm_lightning.errors import UserError
from qm_lightning.runtime.wandb_service import while_service_lives

# Without a network `wandb.init` would try for 90 s.
_INIT_TIMEOUT_S = 30


@dataclass
class TrackingOptions:
    """What goes to W&B.

    Attributes:
        wandb: log to W&B; metrics.csv is written in any case.
        project: W&B project.
        mode: ``online``, ``offline`` or ``disabled``; ``None``: ``WANDB_MODE``, else online if W&B has a key
            and answers, else offline.
        entity: W&B user or team; ``None``: the key's default.
        group: groups runs of one study in the dashboard.
        tags: labels of the run.
        notes: free text of the run.
        artifacts: keep ``best`` and ``last`` as artifacts at the end; W&B copies each on the local disk first.
    """

    wandb: bool = True
    project: str = "qm-lightning"
    mode: Literal["online", "offline", "disabled"] | None = None
    entity: str | None = None
    group: str | None = None
    tags: list[str] = field(default_factory=list)
    notes: str | None = None
    artifacts: bool = False


def wandb_mode(requested: str | None = None, env: Mapping[str, str] = os.environ) -> tuple[str, str]:
    """Decide between online and offline without ever asking a question; waits 11 s at the most.

    Args:
        requested: ``online``, ``offline`` or ``disabled``; ``None``: what the environment says.
        env: the process's environment, for ``WANDB_MODE``.

    Returns:
        The mode, and why.

    Raises:
        UserError: a mode that W&B does not know.
    """
    mode = requested or env.get("WANDB_MODE") or "auto"
    mode = {"dryrun": "offline", "run": "online"}.get(mode, mode)
    if mode not in ("auto", "online", "offline", "disabled"):
        raise UserError(f"found WANDB_MODE={mode!r}; expected online, offline or disabled; set one of them")
    if mode in ("offline", "disabled"):
        return mode, "as asked"
    import wandb

    try:
        logged_in = wandb.login(prompt=False)
    except Exception as error:  # noqa: BLE001, RUF100  # W&B raises a dozen kinds; all mean "not now"
        return "offline", f"W&B did not answer or refused the key ({type(error).__name__})"
    if not logged_in:
        return "offline", "no W&B key; `wandb login` or WANDB_API_KEY make it online"
    return "online", "logged in"


def announce_mode(run_dir: Path, run_id: str, options: TrackingOptions) -> str:
    """Decide the mode and say it in one line, with what to do about it."""
    mode, reason = wandb_mode(options.mode)
    if mode == "disabled":
        print("W&B disabled, as asked; metrics.csv has the figures", flush=True)
        return mode
    how = f"; upload with: wandb sync {run_dir}/wandb/offline-run-*" if mode == "offline" else ""
    print(f"W&B {mode}: {reason}; run {run_id} of project {options.project}{how}", flush=True)
    return mode


class RunLogger(WandbLogger):
    """Lightning's logger with an id that a resume keeps, and a way out when the network or W&B's service fails."""

    service_lost = False

    @classmethod
    def for_run(cls, run_dir: Path, run_id: str, name: str, options: TrackingOptions, mode: str) -> RunLogger:
        """Describe the run; nothing is opened yet.

        Args:
            run_dir: W&B's files go to ``wandb/`` in it.
            run_id: the id that the run keeps for its whole life.
            name: the run's name in the dashboard.
            options: what to track.
            mode: ``online`` or ``offline``.

        Returns:
            The logger.
        """
        import wandb

        logger = cls(
            save_dir=run_dir.resolve(),  # a shared service may stand in another folder
            project=options.project,
            id=run_id,
            name=name,
            resume="allow",
            log_model=False,
            mode=mode,
            entity=options.entity,
            group=options.group,
            tags=options.tags or None,
            notes=options.notes,
            # Offline, W&B prints three lines of what `announce_mode` has said in one.
            settings=wandb.Settings(
                init_timeout=_INIT_TIMEOUT_S, quiet=True, silent=mode == "offline", console="off"
            ),
        )
        # Lightning passes a setting on that W&B has given up and warns of, even where nobody has set it.
        logger._wandb_init.pop("anonymous", None)
        return logger

    @rank_zero_only
    def open(self) -> None:
        """Open the run, offline if W&B does not answer in time."""
        import wandb

        try:
            _ = self.experiment
        except wandb.errors.CommError as error:
            first = (str(error).strip().splitlines() or [""])[0]
            print(f"W&B offline: no answer from the server ({first})", file=sys.stderr, flush=True)
            wandb.teardown()
            self._wandb_init["mode"] = "offline"
            _ = self.experiment

    @rank_zero_only
    @while_service_lives
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """A row of the run's history."""
        super().log_metrics(metrics, step)

    @rank_zero_only
    @while_service_lives
    def log_image(self, key: str, images: list[Any], step: int | None = None, **kwargs: Any) -> None:
        """Pictures, given by their files."""
        super().log_image(key, images, step, **kwargs)

    @rank_zero_only
    @while_service_lives
    def mark_preempting(self) -> None:
        """Tell W&B that the run will go on later."""
        self.experiment.mark_preempting()

    @rank_zero_only
    @while_service_lives
    def close(self) -> None:
        """Hand everything over and end the run, so that a next process can go on with it.

        Left to the end of the process, a W&B service that several processes share would still hold the run.
        """
        if self._experiment is not None:
            self._experiment.finish()
            self._experiment = None

    @rank_zero_only
    def start(self, config: Mapping[str, Any], file: Path) -> None:
        """Open the run and give it the configuration.

        Args:
            config: the whole tree, shown under ``config``.
            file: the same as YAML, kept as the run's file ``experiment/config.yaml``.
        """
        self.open()
        self.log_hyperparams({"config": dict(config)})
        if file.is_file():
            # W&B links to the files that it is given, and writes a `config.yaml` of its own: a link of that name would
            # let it overwrite ours. So it gets a copy, in a folder.
            kept = Path(self.experiment.dir) / "experiment" / file.name
            kept.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, kept)
            self.experiment.save(str(kept), base_path=self.experiment.dir, policy="now")

    @rank_zero_only
    @while_service_lives
    def keep_checkpoints(self, run_id: str, paths: Sequence[Path]) -> None:
        """Make each file a version of the artifact ``checkpoint-RUN``, with its name as alias.

        Args:
            run_id: the run's id.
            paths: e.g. ``best.ckpt`` and ``last.ckpt``; those that exist are taken.
        """
        import wandb

        for path in filter(Path.is_file, paths):
            artifact = wandb.Artifact(f"checkpoint-{run_id}", type="model", metadata={"file": path.name})
            artifact.add_file(str(path), name="model.ckpt", policy="immutable")
            self.experiment.log_artifact(artifact, aliases=[path.stem])
