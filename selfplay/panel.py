"""Plays the held-out panel of a policy: completions, greedy completions, their judgements, and then eval.json."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selfplay import store
from selfplay.evaluate import panel_figures
from selfplay.progress import Reporter
from selfplay.protocols import Generator, Judge, JudgeContext
from selfplay.recipe import Recipe
from selfplay.stages import greedy, judge_groups, sample_groups, sampling_at, shards, timed
from selfplay.train.kl import KLJob
from selfplay.types import Group, Judgement, Prompt, Sampling, derive_seed


@dataclass(frozen=True, slots=True)
class Panel:
    """The same prompts and seeds for every policy. `round` is -1 for the initial policy."""

    recipe: Recipe
    prompts: tuple[Prompt, ...]
    judge: Judge | None
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
        if (folder / "eval.json").exists() or not self.prompts:
            return
        with timed(folder, "panel"):
            for name, sampling in self.draws(between=between).items():
                self._groups(generator, folder, name, sampling, round)

    def judge_all(self, generator: Generator, folder: Path, *, round: int, between: bool) -> None:
        """The scores of the panel's completions. Nothing where there is no judge, or they are all there."""
        if (folder / "eval.json").exists() or not self.prompts or self.judge is None:
            return
        context = JudgeContext(round, derive_seed(self.recipe.seed, "panel judge"), generator)
        with timed(folder, "panel judge"):
            for name, sampling in self.draws(between=between).items():
                groups = self._groups(generator, folder, name, sampling, round)
                judgements = folder / "heldout" / f"{name}-judgements"
                judge_groups(self.judge, groups, context, judgements, self.report, f"judging the panel, {name}")

    def _groups(self, generator: Generator, folder: Path, name: str, sampling: Sampling, round: int) -> list[Group]:
        label = f"panel of the {'initial policy' if round < 0 else f'policy of round {round}'}, {name}"
        return sample_groups(generator, self.prompts, sampling, folder / "heldout" / name, self.report, label)

    def finish(self, folder: Path, *, initial: Path, is_initial: bool) -> dict[str, Any] | None:
        """The figures, in eval.json; None without held-out prompts. Here the engine is gone: KL loads a model."""
        if not self.prompts:
            return None
        path = folder / "eval.json"
        if not path.exists():
            with timed(folder, "kl"):
                kl = 0.0 if is_initial else self._kl(folder / "heldout" / "temperature", initial)
            groups, judgements = self._read(folder / "heldout", "temperature")
            greedy_groups, greedy_judgements = self._read(folder / "heldout", "greedy")
            figures = panel_figures(
                groups,
                judgements,
                greedy_groups,
                greedy_judgements,
                kl=kl,
                temperature=self.recipe.evaluate.temperature,
            )
            store.write_json(path, figures)
        found: dict[str, Any] = store.read_json(path)
        return found

    def _kl(self, folder: Path, initial: Path) -> float | None:
        # at another temperature the engine's raw logps are no expectation under the policy
        if not self.recipe.evaluate.kl or self.recipe.evaluate.temperature != 1.0:
            return None
        from selfplay.train.launch import launch

        train = self.recipe.train
        paths = tuple(str(p) for p in shards(folder))
        cap = None if train.max_pack_tokens == "auto" else train.max_pack_tokens
        result = launch(KLJob(str(initial), paths, bool(train.bf16), cap), self.report)
        kl: float | None = result["kl"]
        return kl

    def _read(self, heldout: Path, name: str) -> tuple[list[Group], list[Judgement] | None]:
        groups = [g for path in shards(heldout / name) for g in store.read_records(path, Group)]
        if self.judge is None or not groups:
            return groups, None
        paths = shards(heldout / f"{name}-judgements")
        return groups, [j for path in paths for j in store.read_records(path, Judgement)]
