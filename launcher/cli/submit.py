"""`broadgauge submit`: a run that is started on a cluster."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from launcher.cli.options import ConfigFile, ForceOption, SetOption
from trainer import config_file
from trainer.config import RunConfig, UserError
from trainer.stop import Interrupted

KUBERNETES = "k8s"
_RAY = ("ray://", "http://", "https://")


def submit(
    path: ConfigFile,
    to: Annotated[
        str, typer.Option("--to", metavar="CLUSTER", help="`k8s`, or the address of a Ray cluster.", show_default=False)
    ],
    run_dir: Annotated[
        str | None, typer.Option("--run-dir", metavar="DIR", help="Folder of the run on the cluster.")
    ] = None,
    follow: Annotated[
        bool, typer.Option("--follow/--no-follow", help="Stay, show what the run says, and end as it ends.")
    ] = True,
    context: Annotated[
        str | None, typer.Option(metavar="NAME", help="k8s: of the kubeconfig; its current one if not given.")
    ] = None,
    namespace: Annotated[
        str | None, typer.Option(metavar="NAME", help="k8s: where runs live; the context's if not given.")
    ] = None,
    queue: Annotated[
        str | None, typer.Option(metavar="NAME", help="k8s: a LocalQueue of Kueue that admits the run.")
    ] = None,
    image: Annotated[
        str | None, typer.Option(metavar="IMAGE", help="k8s: of all pods; the overlay's if not given.")
    ] = None,
    overlay: Annotated[
        str | None,
        typer.Option(metavar="NAME|DIR", help="k8s: of k8s/overlays, or a kustomization of your own; the base if not."),
    ] = None,
    python: Annotated[
        str, typer.Option(metavar="PROGRAM", help="Ray: the interpreter on the cluster's head.")
    ] = "python",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="k8s: print the manifest; needs no cluster.")] = False,
    delete: Annotated[bool, typer.Option("--delete", help="Stop the run, which saves first, and remove it.")] = False,
    force: ForceOption = False,
    settings: SetOption = None,
) -> None:
    """Run a config on a cluster. Submit it again to go on after it has ended; a run that is active is left alone.

    Example: `broadgauge submit configs/quickstart.yaml --to k8s --overlay cpu-kind --namespace broadgauge`,
    or `--to ray://head:10001 --run-dir /shared/runs/quickstart`
    """
    if to.startswith(_RAY):
        config = config_file.load(path, settings or ())
        _submit_to_ray(config, run_dir, to, python, follow=follow, delete=delete, force=force)
        return
    if to != KUBERNETES:
        raise UserError(f"--to {to} is no cluster; use k8s, ray://HOST:PORT, or http://HOST:PORT of Ray's dashboard")
    wanted = _Kubernetes(context, namespace, queue, image, overlay, run_dir, force)
    wanted.submit(path, settings or (), follow=follow, dry_run=dry_run, delete=delete)


def _submit_to_ray(
    config: RunConfig, run_dir: str | None, to: str, python: str, *, follow: bool, delete: bool, force: bool
) -> None:
    from launcher.submit import ray_jobs

    if run_dir is None:
        raise UserError(f"--to {to} needs --run-dir, a folder that all machines of the cluster share")
    if delete:
        _say(f"{ray_jobs.stop(config, Path(run_dir), to)} has ended; submit the run again to go on")
        return
    submitted = ray_jobs.submit(config, Path(run_dir), to, python=python, force=force)
    _say(submitted.line)
    if follow:
        ray_jobs.follow(submitted, lambda text: print(text, end="", flush=True))


@dataclass(frozen=True)
class _Kubernetes:
    """The options that are for Kubernetes."""

    context: str | None
    namespace: str | None
    queue: str | None
    image: str | None
    overlay: str | None
    run_dir: str | None
    force: bool

    def submit(self, path: Path, settings: Sequence[str], *, follow: bool, dry_run: bool, delete: bool) -> None:
        from launcher.submit.kubernetes import names, template

        config = config_file.load(path, settings)
        if delete:
            self._delete(names.object_name(config), config)
            return
        rayjob = self._render(config)
        if dry_run:
            print(template.dump(rayjob), end="")
            return
        from launcher.submit.kubernetes.cluster import connected
        from launcher.submit.kubernetes.following import follow as follow_to_its_end
        from launcher.submit.kubernetes.pace import Pace
        from launcher.submit.kubernetes.submission import submit

        with connected(self.context, self.namespace) as cluster:
            made = submit(cluster, rayjob, _say, Pace())
            if made is not None and follow:
                try:
                    follow_to_its_end(cluster, made, _say, Pace())
                except KeyboardInterrupt as interrupt:
                    raise Interrupted("no longer following; the run goes on, and --delete stops it") from interrupt

    def _render(self, config: RunConfig) -> dict[str, object]:
        from launcher.submit.kubernetes import rayjob, template
        from trainer.checkpoint.huggingface.families.choice import family_of

        family_of(config.model)  # refuses what `run` on the cluster would refuse, when machines are there already
        where = rayjob.Where(self.run_dir, self.image, self.namespace, self.queue, self.force)
        return rayjob.render(template.load(self.overlay), config, where)

    def _delete(self, name: str, config: RunConfig) -> None:
        from launcher.submit.kubernetes import submission
        from launcher.submit.kubernetes.cluster import connected

        with connected(self.context, self.namespace) as cluster:
            submission.delete(cluster, name, config.name, _say)


def _say(line: str) -> None:
    print(line, flush=True)
