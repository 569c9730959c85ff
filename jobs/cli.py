"""The command line: `python -m jobs <verb> [RECIPE|RUN] [options]`; finds the verb, turns errors into exit codes."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass

from jobs.errors import UserError, code_of, describe, nearest
from jobs.launchers import configured
from jobs.settings import Settings, collect
from jobs.terminal import guarded, safe


@dataclass(frozen=True)
class Verb:
    """Where a verb lives and what it takes."""

    where: str  # module.function in jobs/verbs
    help: str
    takes: tuple[str, ...] = ()  # positional arguments, all optional: a variable of that name does as well
    options: tuple[str, ...] = ()

    def load(self) -> Callable[[Settings], int]:
        module, _, name = self.where.partition(".")
        function: Callable[[Settings], int] = getattr(importlib.import_module(f"jobs.verbs.{module}"), name)
        return function


RECIPE, RUN = ("recipe",), ("run",)
RESOLVE = ("set", "profile", "store", "cluster")
LAUNCH = ("launcher", "dirty", "detach", "after")
SHARDS = ("split", "short", "quality", "workers", "licence")
VERBS = {
    "demo": Verb("local.demo", "the whole journey on this machine, in minutes", (), ("fresh", "set")),
    "recipes": Verb("recipes.recipes", "table of the recipes that come with Retort", (), ("json",)),
    "teachers": Verb("teachers.teachers", "table of the weights that Retort knows by name", (), ("json",)),
    "plan": Verb("recipes.plan", "what a recipe costs and what it lacks", RECIPE, (*RESOLVE, "gpu", "gpus", "json")),
    "doctor": Verb("local.doctor", "check this machine, and a recipe's inputs", RECIPE, (*RESOLVE, "quick")),
    "submit": Verb(
        "submit.submit", "start a recipe, or resume it", RECIPE, (*RESOLVE, *LAUNCH, "sweep", "dry", "fresh")
    ),
    "status": Verb("runs.status", "all runs, or one", RUN, ("store", "cluster", "sweep", "json")),
    "logs": Verb("logs.logs", "what the ranks of a run wrote", RUN, ("store", "cluster", "tail", "rank", "follow")),
    "cancel": Verb("runs.cancel", "stop a run", RUN, ("store", "cluster")),
    "resume": Verb(
        "resume.resume", "go on from the newest checkpoint", RUN, ("recipe", *RESOLVE, *LAUNCH, "nproc", "force")
    ),
    "shards": Verb("data.shards", "rewrite a data set into indexed shards", ("src", "dst"), SHARDS),
    "features": Verb(
        "features.features",
        "store a recipe's teacher outputs",
        RECIPE,
        (*RESOLVE, "launcher", "dirty", "split", "views", "codec", "nproc", "verify", "advise", "select", "dry"),
    ),
    "eval": Verb("results.evaluate", "evaluate a run's student", RUN, ("set", "store", "eval", "json")),
    "export": Verb("results.export", "write a run's student for others to load", RUN, ("store", "format")),
    "report": Verb("results.report", "write a run's report", RUN, ("store",)),
    "gc": Verb("gc.gc", "remove what no run refers to", (), ("store", "dry", "days")),
    "image": Verb("image.image", "build the container image", (), ("base", "tag", "target", "dirty")),
    "manifests": Verb("manifests.manifests", "render a recipe's sbatch file or RayJob", RECIPE, (*RESOLVE, "launcher")),
    "bench": Verb("local.bench", "measure throughput and overheads", RECIPE, RESOLVE),
}
OPTIONS = {
    "set": ("a.b=c d.e=f: override fields of the recipe", "append"),
    "profile": ("overlay of sizes, for example smoke", None),
    "launcher": ("auto, local, slurm or ray", None),
    "store": ("s3://bucket/prefix or file:///folder (else RETORT_STORE, else .retort/store here)", None),
    "dry": ("say what would happen, do nothing", "store_true"),
    "fresh": ("a new run, also when this one exists", "store_true"),
    "dirty": ("run uncommitted code", "store_true"),
    "detach": ("return at once instead of following the run", "store_true"),
    "json": ("machine-readable output", "store_true"),
    "eval": ("protocols, for example knn,linear", None),
    "format": ("timm, safetensors", None),
    "gpu": ("kind of GPU to plan for", None),
    "gpus": ("number of GPUs to plan for", int),
    "recipe": ("a recipe that has changed since the run began", None),
    "nproc": ("ranks to go on with, or workers", int),
    "force": ("also when that changes what is trained", "store_true"),
    "days": ("also runs that ended so many days ago and that no other run refers to", int),
    "views": ("stored views of a training image, else data.views", int),
    "codec": ("fp32, bf16, fp16, fp8 or int8, else data.codec", None),
    "advise": ("measure here, and say whether to store or to compute every time", "store_true"),
    "select": ("URI [top=5 least=0 english=0.9 names=URI]: write the sentences that images show there", None),
    "verify": ("read all that is stored again, drop what is damaged", "store_true"),
    "split": ("which split of the data, when there are several; features: train,heldout,texts", None),
    "short": ("resize larger images to this short side in pixels (else: files as they are)", int),
    "quality": ("of the JPEG files of resized images, 1 to 100 (else 90)", int),
    "workers": ("processes (else one a core)", int),
    "licence": ("note on the data's licence, kept with them", None),
    "cluster": ("a file of jobs/clusters, by name or path (else RETORT_CLUSTER)", None),
    "sweep": ("submit: a.b=1,2 c.d=3,4: a run for each combination; status: a sweep's name", None),
    "after": ("eval, export, report: what to do when the run has succeeded", None),
    "rank": ("logs of this rank only", None),
    "follow": ("go on as the logs grow", "store_true"),
    "tail": ("last lines of each log only", int),
    "quick": ("what takes a second: no recipe, no store, no ranks", "store_true"),
    "base": ("image to build on, NAME@sha256:...", None),
    "tag": ("name of the image, else retort:latest", None),
    "target": ("train, or demo for a CPU", None),
}


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="python -m jobs",
        description="Distil vision foundation models.",
        epilog="Exit codes: 0 ok, 1 failed, 2 wrong input, 3 environment not ready, 75 preempted.",
    )
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, verb in VERBS.items():
        sub = verbs.add_parser(name, help=verb.help, description=verb.help, allow_abbrev=False)
        for positional in verb.takes:
            sub.add_argument(positional, nargs="?", metavar=positional.upper())
        for option in verb.options:
            _add_option(sub, option)
    return top


def _add_option(sub: argparse.ArgumentParser, name: str) -> None:
    text, kind = OPTIONS[name]
    flag = f"--{name.replace('_', '-')}"
    short = [f"-{name[0]}"] if name == "follow" else []
    if isinstance(kind, str):
        sub.add_argument(flag, *short, dest=name, action=kind, help=text)
    else:
        sub.add_argument(flag, dest=name, type=kind or str, help=text, metavar=name.upper())


def main(arguments: list[str]) -> int:
    """Run one command; returns its exit code. A traceback appears for bugs only."""
    try:
        if arguments and not arguments[0].startswith("-") and arguments[0] not in VERBS:
            raise UserError(f"unknown verb {arguments[0]!r}{nearest(arguments[0], VERBS)} (python -m jobs --help)")
        parsed = parser().parse_args(arguments)
        settings = collect(parsed, os.environ)
        with guarded(), configured(settings.cluster):
            return VERBS[parsed.verb].load()(settings)
    except BrokenPipeError:  # `... | head` is no error
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        sys.stdout.flush()
        print(safe(describe(error)), file=sys.stderr)
        return code_of(error)
