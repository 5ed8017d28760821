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

    def sample(self, generator: Generator, folder: Path, *, round: int, between: bool) -> None:
        """Everything that needs the policy's engine. Nothing where it is all there."""
        if (folder / "eval.json").exists() or not self.prompts:
            return
        where = "initial policy" if round < 0 else f"policy of round {round}"
        heldout, context = (
            folder / "heldout",
            JudgeContext(round, derive_seed(self.recipe.seed, "panel judge"), generator),
        )
        with timed(folder, "panel"):
            draws = {"temperature": self.sampling(between=between)}
            if self.recipe.evaluate.greedy:
                draws["greedy"] = greedy(draws["temperature"])
            for name, sampling in draws.items():
                label = f"panel of the {where}, {'greedy' if name == 'greedy' else f'T {sampling.temperature:g}'}"
                groups = sample_groups(generator, self.prompts, sampling, heldout / name, self.report, label)
                if self.judge is not None:
                    judgements = heldout / f"{name}-judgements"
                    judge_groups(self.judge, groups, context, judgements, self.report, f"judging the {label}")

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
            figures = panel_figures(groups, judgements, greedy_groups, greedy_judgements, kl=kl)
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
        result = launch(KLJob(str(initial), paths, bool(train.bf16), train.max_pack_tokens), self.report)
        kl: float | None = result["kl"]
        return kl

    def _read(self, heldout: Path, name: str) -> tuple[list[Group], list[Judgement] | None]:
        groups = [g for path in shards(heldout / name) for g in store.read_records(path, Group)]
        if self.judge is None or not groups:
            return groups, None
        paths = shards(heldout / f"{name}-judgements")
        return groups, [j for path in paths for j in store.read_records(path, Judgement)]
