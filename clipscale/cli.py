"""The console command. Sub-commands import what they need when they run, so that ``--help`` is quick."""

from __future__ import annotations

import os
import sys
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from clipscale.apps.audit.cli import audit_command
from clipscale.apps.data.cli import data_app
from clipscale.apps.evaluation.cli import eval_command, results_command
from clipscale.apps.explain.cli import explain_check_command, explain_command
from clipscale.apps.probing.cli import probing_app
from clipscale.apps.search.cli import embed_command, rerank_command, search_app
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
app.add_typer(probing_app)


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


@app.command("plan")
def plan_command(
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="As for train.")] = None,
    hardware: Annotated[
        str | None,
        typer.Option("--hardware", "--gpu", help="a100, h100, h200, b200, mi300x, cpu, ...; else this machine's."),
    ] = None,
    efficiency: Annotated[float | None, typer.Option(help="Share of the peak that the towers' products reach.")] = None,
    tokens: Annotated[float | None, typer.Option(help="Tokens of a caption, in the mean [17, as LAION's].")] = None,
    data_samples: Annotated[int | None, typer.Option(help="Samples of the training data, to count epochs.")] = None,
    price: Annotated[float | None, typer.Option(help="Of a GPU for an hour.")] = None,
    measure: Annotated[bool, typer.Option("--measure", help="Time steps on this machine, and calibrate.")] = False,
    sweep: Annotated[
        list[str] | None, typer.Option(help="KEY=VALUE,VALUE,...: a row for each; again for combinations.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a picture (.png) of step time and memory.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    config_dir: Annotated[str | None, typer.Option(help="A tree of config groups of your own.")] = None,
) -> None:
    """Tell what a configuration takes before it runs: parameters, memory, time, cost, and what would fit."""
    from clipscale.planner.command import Options, plan

    options = Options(hardware, efficiency, tokens, data_samples, price, measure, config_dir)
    plan(overrides or [], options, sweep or (), plot, as_json)


@app.command("doctor")
def doctor_command(
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="As for train.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    config_dir: Annotated[str | None, typer.Option(help="A tree of config groups of your own.")] = None,
) -> None:
    """Look for what would break a run on this machine; exit code 2 if something would."""
    from clipscale.planner.doctor import doctor

    if not doctor(overrides or [], config_dir, as_json):
        raise typer.Exit(ExitCode.USER_ERROR)


@app.command("launch", context_settings={"allow_extra_args": True, "allow_interspersed_args": True})
def launch_command(
    overrides: Annotated[list[str], typer.Argument(help="As for train: cluster=slurm cluster.nodes=16 …")],
    show: Annotated[bool, typer.Option("--print", help="Show what would be submitted, and do not.")] = False,
    config_dir: Annotated[
        Path | None, typer.Option(help="A tree of config groups of your own, where all nodes see it.")
    ] = None,
) -> None:
    """Train on the nodes of a cluster: submits to Slurm or Kubernetes, or starts the processes of this machine."""
    if config_dir is not None and not config_dir.is_dir():
        raise ClipscaleError(f"--config-dir {config_dir}: there is no such directory")
    from clipscale.config.compose import search_path

    search = [] if config_dir is None else [search_path(config_dir)]
    raise typer.Exit(launch([*overrides, *search], show))


app.command("eval")(eval_command)
app.command("results")(results_command)
app.command("embed")(embed_command)
app.add_typer(search_app)
app.command("rerank")(rerank_command)
app.command("explain")(explain_command)
app.command("explain-check")(explain_check_command)
app.command("audit")(audit_command)


@app.command("export")
def export_command(
    run: Annotated[Path, typer.Argument(help="A run directory or one of its checkpoints.")],
    to: Annotated[str, typer.Option(help="open_clip, hf, safetensors or onnx.")],
    out: Annotated[Path, typer.Option(help="Directory to write; it must be new or empty.")],
    audit: Annotated[
        Path | None, typer.Option(help="What `clipscale audit --json` printed, for the card's section on biases.")
    ] = None,
) -> None:
    """Write what a run trained as a directory that another library loads, with a model card."""
    from clipscale.apps.export import export

    export(run, to, out, audit)


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


runs_app = typer.Typer(name="runs", help="List, show and compare runs.", no_args_is_help=True)
app.add_typer(runs_app)
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Run = Annotated[Path, typer.Argument(help="A run directory.")]


@runs_app.command("ls")
def runs_ls_command(
    directory: Annotated[Path, typer.Argument(help="Where the runs lie, at any depth.")] = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """List runs, the newest last: state, samples seen, loss, objective, samples/s, goodput."""
    from clipscale.apps.runs import list_runs

    list_runs(directory, as_json)


@runs_app.command("show")
def runs_show_command(run: Run, as_json: AsJson = False) -> None:
    """Show what became of a run, what stands out, and where its time went."""
    from clipscale.apps.runs import show_run

    show_run(run, as_json)


@runs_app.command("diff")
def runs_diff_command(first: Run, second: Run) -> None:
    """Show in what two runs differ: configuration, environment, results."""
    from clipscale.apps.runs import compare_runs

    compare_runs(first, second)


@runs_app.command("sweep")
def runs_sweep_command(
    runs: Annotated[list[Path], typer.Argument(help="Runs, or directories of runs.")],
    plot: Annotated[Path | None, typer.Option(help="Write a picture (.png) of the objective over what varied.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show what was varied over runs and what came of it, the best by eval.objective first."""
    from clipscale.apps.sweep import show_sweep

    show_sweep(runs, plot, as_json)


@runs_app.command("exit-code")
def runs_exit_code_command(run: Run) -> None:
    """Print the exit code that a run ended with, and exit with it: torchrun hides it from schedulers."""
    from clipscale.apps.runs import exit_code

    raise typer.Exit(exit_code(run))


@app.command("report")
def report_command(
    runs: Annotated[list[Path], typer.Argument(help="A run; several, or a directory of runs, are shown side by side.")],
    out: Annotated[Path | None, typer.Option(help="The page; RUN/report.html, or report.html for several.")] = None,
) -> None:
    """Write a page that shows a run, or compares several: one HTML file that needs nothing else."""
    from clipscale.apps.report import write_report

    print(write_report(runs, out))


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

    from clipscale.config.compose import compose, config_dir, explain, quote_shards, typed

    ended: list[Started] = []
    errors: list[ClipscaleError] = []
    overrides = quote_shards([argument for argument in arguments if _is_override(argument)])
    options = [argument for argument in arguments if not _is_override(argument)]

    def task(node: DictConfig) -> float | None:
        choices = HydraConfig.get().runtime.choices
        given = [str(override) for override in HydraConfig.get().overrides.task]
        try:
            one = start(typed(node), choices.get("experiment") or "custom", given)
        except ClipscaleError as error:  # kept from Hydra, which would put a remark of its own before it
            errors.append(error)
            return None
        if one.code == ExitCode.PREEMPTED:
            raise SystemExit(one.code)  # a sweep stops as well
        ended.append(one)
        return one.objective

    os.environ["HYDRA_FULL_ERROR"] = "1"  # let errors come to us, to be told in one line
    sys.argv = ["clipscale train", *options, *overrides]  # Hydra's parser wants all overrides in one place
    try:
        hydra.main(config_path=str(config_dir().absolute()), config_name="config", version_base="1.3")(task)()
    except Exception as error:
        if not ({"-m", "--multirun"} & set(options) or ended):
            compose(overrides, _user_dir(arguments))  # says all that is wrong, where Hydra stops at the first
        if type(error).__module__.partition(".")[0] not in ("hydra", "omegaconf", "yaml"):
            raise
        raise explain(error, overrides) from error
    if len({one.path for one in ended}) > 1:
        from clipscale.apps.sweep import show_sweep

        try:
            show_sweep([one.path for one in ended], plot=None, as_json=False)
        except ClipscaleError as error:  # of several objectives, say
            print(f"no table of the sweep: {error}", file=sys.stderr)
    if errors:
        raise errors[0]
    return next((one.code for one in ended if one.code), 0)


def _is_override(argument: str) -> bool:
    return not argument.startswith("-") and ("=" in argument or argument.startswith("~"))


def _user_dir(arguments: list[str]) -> str | None:
    """What ``--config-dir`` says."""
    words = [word for argument in arguments for word in argument.split("=", 1)]
    return next((value for name, value in pairwise(words) if name in ("--config-dir", "-cd")), None)


def launch(overrides: list[str], show: bool = False) -> int:
    """``clipscale launch``: start a run here, or submit it. Returns the exit code."""
    from clipscale.config import compose
    from clipscale.launch import submit

    config, experiment = compose(overrides)
    if _is_local(config) and not show:
        return start(config, experiment, overrides).code
    return submit(config, experiment, overrides, show)


def _is_local(config: Config) -> bool:
    return config.cluster.nodes == 1 and config.cluster.scheduler.value == "none"


class Started(NamedTuple):
    """What a run that was started came to."""

    code: int
    objective: float | None
    path: Path


def start(config: Config, experiment: str, overrides: list[str]) -> Started:
    """Open the run's directory and train it."""
    from clipscale.config.rundir import open_run, read_result
    from clipscale.train import recorded_config

    cluster = config.cluster
    if not _is_local(config):
        raise ClipscaleError(
            f"cluster.nodes={cluster.nodes}, cluster.scheduler={cluster.scheduler.value}: `clipscale train` starts the "
            "processes of one machine; use `clipscale launch` with these overrides"
        )
    run = open_run(config, experiment, overrides, cluster.processes_per_node, recorded_config)
    if cluster.processes_per_node > 1:
        from clipscale.launch.node import start_ranks

        here = ["--standalone", f"--nproc-per-node={cluster.processes_per_node}"]
        restarts = f"--max-restarts={cluster.max_restarts}"
        code = start_ranks([*here, restarts], ["--config", str(run.path / "config.yaml")])
    else:
        # OpenMP's threads wait for each other by spinning. Beside a busy loader worker (or anything else) on the same
        # core they spin for nothing; kept short, training goes half as fast again there, and no slower alone.
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
        from clipscale.train import main as train_here

        code = train_here(["--config", str(run.path / "config.yaml")])
    return Started(int(code), (read_result(run.path) or {}).get("objective"), run.path)


def main() -> None:
    """Entry point: a mistake of the user's is one line and exit code 2, never a traceback."""
    try:
        app()
    except ClipscaleError as error:
        if _says(str(error)):
            print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)


def _says(text: str) -> bool:
    """Whether this process is the one to say it: of ranks that all come to the same mistake, one is."""
    if "RANK" not in os.environ:
        return True
    from clipscale.distributed.runtime import says_first

    return says_first(text)


if __name__ == "__main__":
    main()
