"""`--help`: every setting that the parser knows, and those of the classes that the files name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import lightning.pytorch as L
from jsonargparse import ArgumentParser
from lightning.pytorch.cli import LightningArgumentParser

from lit_gen.classes import keep_to_packages, resolve
from lit_gen.errors import UserError
from lit_gen.mistakes import resolved, with_overrides
from lit_gen.run import Run
from lit_gen.settings import KeyPath
from lit_gen.stage import Command

SHOWN = ("model", "data", "trainer")  # where files name classes


class _Help(Command):
    """Has the parser print its own help, and ends there."""

    def __init__(self, verb: str, words: list[str]) -> None:
        self.words = words
        super().__init__(verb, [], [])

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        parser.parse_args([self.verb, *self.words])


def explain(verb: str, words: list[str], runs: list[Run]) -> int:
    """Print what `words` (--help, or --KEY.help [=CLASS]) ask for; of the classes of `runs` each at its place once."""
    keep_to_packages()
    named = list(dict.fromkeys(pair for run in runs for pair in _classes(run)))
    if words == ["--help"]:
        with suppress(SystemExit):
            _Help(verb, words)
        wanted = named
    else:
        wanted = []
        for word in words:
            key, _, name = word.removeprefix("--").partition("=")
            key = key.removesuffix(".help")
            if name or not runs:
                with suppress(SystemExit):
                    _Help(verb, [word])
                continue
            found = [pair for pair in named if pair[0] == key]
            if not found:
                raise UserError(f"--{key}.help: the files name no class for `{key}`; give one, --{key}.help CLASS")
            wanted += found
    for key, name in wanted:
        _print_class(key, name)
    return 0


def _classes(run: Run) -> Iterator[tuple[str, str]]:
    """(key as on the command line, class path) of every class that a run's settings name."""
    tree, _ = resolved(with_overrides(run))
    for top in SHOWN:
        for path, name in _nodes(tree.data.get(top), (top,)):
            yield ".".join(str(part) for part in path if part != "init_args"), name


def _nodes(value: Any, path: KeyPath) -> Iterator[tuple[KeyPath, str]]:
    if isinstance(value, str) and path in (("model",), ("data",)):  # the class alone
        yield path, value
    elif isinstance(value, dict):
        if isinstance(value.get("class_path"), str):
            yield path, value["class_path"]
        for key, item in value.items():
            yield from _nodes(item, (*path, key))
    elif isinstance(value, list):
        for item in value:  # whose places say nothing
            yield from _nodes(item, path)


def _print_class(key: str, name: str) -> None:
    cls = resolve(name, None if "." in name else L.Callback | L.LightningModule | L.LightningDataModule)
    if isinstance(cls, str):
        raise UserError(f"`{key}`: {cls}")
    parser = ArgumentParser(prog="", usage="", add_help=False, default_env=False)
    parser.add_class_arguments(cls, key, fail_untyped=False)
    print(f"\n{key} = {name}\n{parser.format_help().removeprefix('usage: ').strip()}")
