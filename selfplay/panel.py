"""Plays the held-out panel of a policy: completions, greedy completions, their judgements, and then eval.json."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selfplay import store
from selfplay.evaluate import panel_figures
from selfplay.progress import Reporter
from selfplay.protocols import Generator, Judge, JudgeContext
from selfplay.recipe import Recipe
from selfplay.records import Records
from selfplay.stages import Judging, greedy, judge_each, sample_groups, sampling_at, shards, timed
from selfplay.train.kl import KLJob
from selfplay.types import Group, Judgement, Prompt, Sampling, derive_seed


@dataclass(frozen=True, slots=True)
class HeldOut:
    """The held-out prompts of a source and their judge. `name` is "" where the recipe has one source."""

    name: str
    prompts: Sequence[Prompt]
    judge: Judge | None


@dataclass(frozen=True, slots=True)
class Panel:
    """The same prompts and seeds for every policy. `round` is -1 for the initial policy."""

    recipe: Recipe
    sources: tuple[HeldOut, ...]  # those that hold any prompts out
    report: Reporter

    def sampling(self, *, between: bool) -> Sampling:
        """Untruncated sampling at the panel's temperature; the rounds between may get fewer completions."""
        recipe = self.recipe.evaluate
        count = recipe.num_completions_between if between and recipe.num_completions_between else recipe.num_completions
        base = sampling_at(self.recipe.generator, 0, seed=derive_seed(self.recipe.seed, "panel"))
        return Sampling(
            num_completions=count,
            temperature=recipe.temperature,
            max_tokens=recipe.max_tokens or base.max_tokens,
            stop=base.stop,
            seed=base.seed,
        )

    def draws(self, *, between: bool) -> dict[str, Sampling]:
        """How the panel is sampled, by the name of its folder."""
        sampling = self.sampling(between=between)
        return {"temperature": sampling} | ({"greedy": greedy(sampling)} if self.recipe.evaluate.greedy else {})

    def sample(self, generator: Generator, folder: Path, *, round: int, between: bool) -> None:
        """The panel's completions. Nothing where they are all there."""
        if (folder / "eval.json").exists() or not self.sources:
            return
        with timed(folder, "panel"):
            for source in self.sources:
                for name, sampling in self.draws(between=between).items():
                    self._groups(source, generator, folder, name, sampling, round)

    def judge_all(self, generator: Generator, folder: Path, *, round: int, between: bool) -> None:
        """The scores of the panel's completions. Nothing where there is no judge, or they are all there."""
        if (folder / "eval.json").exists() or all(source.judge is None for source in self.sources):
            return
        context = JudgeContext(round, derive_seed(self.recipe.seed, "panel judge"), generator)
        asked = []
        with timed(folder, "panel judge"):
            for source in self.sources:
                for name, sampling in self.draws(between=between).items():
                    if source.judge is not None:
                        groups = self._groups(source, generator, folder, name, sampling, round)
                        judgements = folder / "heldout" / source.name / f"{name}-judgements"
                        label = f"judging the panel, {_named(name, source)}"
                        asked.append(Judging(source.judge, groups, judgements, label))
            judge_each(asked, context, self.report)

    def _groups(
        self, source: HeldOut, generator: Generator, folder: Path, name: str, sampling: Sampling, round: int
    ) -> Sequence[Group]:
        label = f"panel of the {'initial policy' if round < 0 else f'policy of round {round}'}, {_named(name, source)}"
        shards = folder / "heldout" / source.name / name
        return sample_groups(generator, source.prompts, sampling, shards, self.report, label)

    def finish(self, folder: Path, *, initial: Path, is_initial: bool) -> dict[str, Any] | None:
        """The figures, in eval.json; None without held-out prompts. Here the engine is gone: KL loads a model."""
        if not self.sources:
            return None
        path = folder / "eval.json"
        if not path.exists():
            with timed(folder, "kl"):
                kl = 0.0 if is_initial else self._kl(folder / "heldout", initial)
            store.write_json(path, self._all_figures(folder / "heldout", kl))
        found: dict[str, Any] = store.read_json(path)
        return found

    def _all_figures(self, heldout: Path, kl: float | None) -> dict[str, Any]:
        """Of all held-out prompts; several sources have figures of their own beside them, and their scores there alone, since
        judges may score on different scales. KL is of all.
        """
        if [source.name for source in self.sources] == [""]:
            return self._figures(heldout, self.sources, kl, judged=True)
        own = {source.name: self._figures(heldout, [source], None, judged=True) for source in self.sources}
        return self._figures(heldout, self.sources, kl, judged=False) | {"sources": own}

    def _figures(self, heldout: Path, sources: Sequence[HeldOut], kl: float | None, *, judged: bool) -> dict[str, Any]:
        groups, judgements = self._read(heldout, "temperature", sources, judged=judged)
        greedy_groups, greedy_judgements = self._read(heldout, "greedy", sources, judged=judged)
        return panel_figures(
            groups,
            judgements,
            greedy_groups,
            greedy_judgements,
            kl=kl,
            temperature=self.recipe.evaluate.temperature,
        )

    def _kl(self, heldout: Path, initial: Path) -> float | None:
        # at another temperature the engine's raw logps are no expectation under the policy
        if not self.recipe.evaluate.kl or self.recipe.evaluate.temperature != 1.0:
            return None
        from selfplay.train.launch import launch

        train = self.recipe.train
        paths = tuple(str(p) for source in self.sources for p in shards(heldout / source.name / "temperature"))
        cap = None if train.max_pack_tokens == "auto" else train.max_pack_tokens
        result = launch(KLJob(str(initial), paths, bool(train.bf16), cap), self.report)
        kl: float | None = result["kl"]
        return kl

    def _read(
        self, heldout: Path, name: str, sources: Sequence[HeldOut], *, judged: bool
    ) -> tuple[Sequence[Group], Sequence[Judgement] | None]:
        folders = [heldout / source.name for source in sources]
        groups = Records(Group, [path for folder in folders for path in shards(folder / name)])
        if not judged or not groups or any(source.judge is None for source in sources):
            return groups, None
        paths = [path for folder in folders for path in shards(folder / f"{name}-judgements")]
        return groups, Records(Judgement, paths)


def _named(draw: str, source: HeldOut) -> str:
    return f"{draw}, {source.name}" if source.name else draw
