"""The console command. Sub-commands import what they need when they run, so that ``--help`` is quick."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from clipscale.apps.data.cli import data_app
from clipscale.errors import ClipscaleError, ExitCode

if TYPE_CHECKING:
    from clipscale.config import Config

app = typer.Typer(
    name="clipscale",
    help="Train CLIP-style image-text models at any scale, and use what you trained.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(data_app)


@app.command(
    "train",
    add_help_option=False,
    context_settings={
        "allow_extra_args": True,
        "ignore_unknown_options": True,
        "allow_interspersed_args": False,
    },
    help="Train a model: clipscale train KEY=VALUE ...; clipscale train --help lists the choices.",
)
def train_command(context: typer.Context) -> None:
    raise typer.Exit(train(context.args))


@app.command("eval")
def eval_command(
    run: Annotated[Path, typer.Argument(help="A run directory or one of its checkpoints.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Evaluate on something else: data.val.shards=… data.zeroshot.classes=…"),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Evaluate what a run trained: validation loss, retrieval both ways, zero-shot classification."""
    from clipscale.apps.evaluate import evaluate

    evaluate(run, overrides or [], device, as_json)


@app.command("export")
def export_command(
    run: Annotated[Path, typer.Argument(help="A run directory or one of its checkpoints.")],
    to: Annotated[str, typer.Option(help="open_clip, hf, safetensors or onnx.")],
    out: Annotated[Path, typer.Option(help="Directory to write; it must be new or empty.")],
) -> None:
    """Write what a run trained as a directory that another library loads, with a model card."""
    from clipscale.apps.export import export

    export(run, to, out)


@app.command("interpolate")
def interpolate_command(
    first: Annotated[str, typer.Argument(help="A run, a checkpoint, or what else init.weights takes.")],
    second: Annotated[str, typer.Argument(help="Another of the same architecture, e.g. one fine-tuned from it.")],
    alpha: Annotated[list[float], typer.Option(help="Share of SECOND, from 0 to 1; give it again for several.")],
    out: Annotated[Path, typer.Option(help="Directory to write; it must be new or empty.")],
    classes: Annotated[
        str | None, typer.Option(help="Class names and prompts of a classifier, where its run does not name them.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Write the weights between two models, as for WiSE-FT: fine-tuned and zero-shot in one."""
    from clipscale.apps.interpolate import interpolate

    interpolate(first, second, alpha, out, classes, device)


checkpoint_app = typer.Typer(name="checkpoint", help="List, verify and average checkpoints.", no_args_is_help=True)
app.add_typer(checkpoint_app)
Where = Annotated[str, typer.Argument(help="A run, a checkpoint, or a URL of either: s3://BUCKET/PREFIX/NAME.")]
StorageKeys = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="storage.… keys.")]


@checkpoint_app.command("ls")
def checkpoint_ls_command(where: Where, overrides: StorageKeys = None) -> None:
    """List the checkpoints of a run: samples seen, size, and whether they are finished, best, kept or pinned."""
    from clipscale.apps.checkpoints import list_checkpoints

    list_checkpoints(where, overrides or [])


@checkpoint_app.command("verify")
def checkpoint_verify_command(where: Where, overrides: StorageKeys = None) -> None:
    """Hold every byte of a checkpoint, or of all of a run, against its checksums; exit code 2 if one is damaged."""
    from clipscale.apps.checkpoints import verify

    verify(where, overrides or [])


@checkpoint_app.command("average")
def checkpoint_average_command(
    checkpoints: Annotated[list[Path], typer.Argument(help="Checkpoints, or runs, whose newest counts.")],
    out: Annotated[Path, typer.Option(help="Directory to write; it must be new or empty.")],
) -> None:
    """Write the mean of the weights of several checkpoints, for eval, export, load and init.weights."""
    from clipscale.apps.checkpoints import average

    average(checkpoints, out)


@app.command("version")
def version_command() -> None:
    """Print the version."""
    from clipscale import __version__

    print(__version__)


def train(arguments: list[str]) -> int:
    """``clipscale train``: compose once, in one process, then train here or start the ranks. Returns the exit code."""
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import DictConfig

    from clipscale.config.compose import config_dir, explain, quote_shards, typed

    codes: list[int] = []
    errors: list[ClipscaleError] = []
    overrides = quote_shards([argument for argument in arguments if _is_override(argument)])
    options = [argument for argument in arguments if not _is_override(argument)]

    def task(node: DictConfig) -> float | None:
        choices = HydraConfig.get().runtime.choices
        given = [str(override) for override in HydraConfig.get().overrides.task]
        try:
            code, objective = start(typed(node), choices.get("experiment") or "custom", given)
        except ClipscaleError as error:  # kept from Hydra, which would put a remark of its own before it
            errors.append(error)
            return None
        if code == ExitCode.PREEMPTED:
            raise SystemExit(code)  # a sweep stops as well
        codes.append(code)
        return objective

    os.environ["HYDRA_FULL_ERROR"] = "1"  # let errors come to us, to be told in one line
    sys.argv = ["clipscale train", *options, *overrides]  # Hydra's parser wants all overrides in one place
    try:
        hydra.main(config_path=str(config_dir().absolute()), config_name="config", version_base="1.3")(task)()
    except Exception as error:
        if type(error).__module__.partition(".")[0] in ("hydra", "omegaconf"):
            raise explain(error, overrides) from error
        raise
    if errors:
        raise errors[0]
    return next((code for code in codes if code), 0)


def _is_override(argument: str) -> bool:
    return not argument.startswith("-") and ("=" in argument or argument.startswith("~"))


def start(config: Config, experiment: str, overrides: list[str]) -> tuple[int, float | None]:
    """Open the run's directory and train it. Returns the exit code and the objective."""
    from clipscale.config.rundir import open_run, read_result
    from clipscale.train import recorded_config

    cluster = config.cluster
    if cluster.nodes > 1 or cluster.scheduler.value != "none":
        raise ClipscaleError(
            f"cluster.nodes={cluster.nodes}, cluster.scheduler={cluster.scheduler.value}: `clipscale train` starts the "
            "processes of one machine; use launch/slurm.sbatch, or launch/torchrun.sh on every node, with these "
            "overrides"
        )
    run = open_run(config, experiment, overrides, cluster.processes_per_node, recorded_config)
    if cluster.processes_per_node > 1:
        from clipscale.launch.local import launch

        code = launch(run.path / "config.yaml", cluster.processes_per_node, cluster.max_restarts)
    else:
        # OpenMP's threads wait for each other by spinning. Beside a busy loader worker (or anything else) on the same
        # core they spin for nothing; kept short, training goes half as fast again there, and no slower alone.
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
        from clipscale.train import main as train_here

        code = train_here(["--config", str(run.path / "config.yaml")])
    return int(code), (read_result(run.path) or {}).get("objective")


def main() -> None:
    """Entry point: a mistake of the user's is one line and exit code 2, never a traceback."""
    try:
        app()
    except ClipscaleError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
