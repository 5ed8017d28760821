"""Experiment B: the accuracy of its judges, the judge that the policy becomes, and its table."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from figures import Gain, Panel, dose_residual, gain, markdown, read_panel
from lab import ROOT, Item, Lab
from splits import place as hash_of
from splits import write_split
from steps import fit

from selfplay import store
from selfplay.judges.template import load_template
from selfplay.types import Completion, Group, Judgement

RULES = {"judge": {"kind": "verifier", "score": "all"}}


def prepare(lab: Lab, *, data_only: bool = False) -> None:
    """The split, and the accuracy of every judge, before anything is played."""
    write_split(ROOT / "recipes" / "data" / "quickstart_train.jsonl", lab.plan["data"], Path(lab.files["data"]))
    if not data_only and lab.id == "B":
        measure_judges(lab)


def judged_groups(lab: Lab, part: str, num_completions: int) -> list[tuple[Group, Judgement]]:
    """The untrained model's completions of a part of the prompts, and the rules' verdicts."""
    from selfplay import single

    source = Path(lab.files["data"]) / f"{part}.jsonl"
    values = RULES | {"prompts.source": str(source), "prompts.num_prompts": len(store.read_json_lines(source))}
    recipe = lab.recipe(values | {"generator.num_completions": num_completions})
    folder = lab.out / part
    groups = single.generate(recipe, lab.model, folder / "groups", round=0, report=lab.report)
    inputs = folder / "groups", folder / "judgements"
    judgements = single.judge(recipe, *inputs, model=None, round=0, allow_code=False, report=lab.report)
    return list(zip(groups[""], judgements[""], strict=True))


def sorted_out(group: Group, judgement: Judgement) -> tuple[list[Completion], list[Completion]]:
    """The finished completions that pass, and those that fail, each in an order by hash."""
    finished = [(c, s) for c, s in zip(group.completions, judgement.scores, strict=True) if c.finish_reason == "stop"]
    ordered = sorted(finished, key=lambda row: hash_of(group.prompt.id + row[0].text))
    return [c for c, s in ordered if s == 1.0], [c for c, s in ordered if s == 0.0]


def unseen_pairs(lab: Lab) -> Path:
    """Labelled pairs of the dev prompts, as a preference file."""
    path, plan, rows = lab.out / "unseen.jsonl", lab.plan["pairs"], []
    if path.exists():
        return path
    for group, judgement in judged_groups(lab, "dev", plan["num_completions"]):
        passing, failing = sorted_out(group, judgement)
        both = [(good, bad) for good in passing for bad in failing]
        both.sort(key=lambda pair: hash_of(pair[0].text + pair[1].text))
        for good, bad in both[: plan["most_per_prompt"]]:
            row = {"prompt": group.prompt.text, "chosen": good.text, "rejected": bad.text}
            rows.append(row | {"checks": list(group.prompt.checks)})
    store.write_json_lines(path, rows)
    return path


def yes_no_policy(lab: Lab) -> Path:
    """The model after SFT on yes/no questions about its own completions, as many yes as no."""
    folder, plan = lab.out / "yes-no", lab.plan["yes_no"]
    policy, path = folder / "policy", folder / "questions.jsonl"
    if not policy.exists():
        template = load_template("yes_no", Path())
        rows: dict[str, list[dict[str, Any]]] = {"yes": [], "no": []}
        for group, judgement in judged_groups(lab, "judge", plan["num_completions"]):
            for word, completions in zip(("yes", "no"), sorted_out(group, judgement), strict=True):
                for completion in completions:
                    asked = [{"role": m.role, "content": m.content} for m in template.fill(group.prompt, completion)]
                    rows[word].append({"messages": [*asked, {"role": "assistant", "content": word}]})
        count = min(len(part) for part in rows.values())
        chosen = [row for part in rows.values() for row in sorted(part, key=lambda r: hash_of(str(r)))[:count]]
        if not path.exists():
            store.write_json_lines(path, chosen)
        fit(lab, plan["set"], Path(lab.model), path, folder, seed=0)
    return policy


def measure_judges(lab: Lab, only: Callable[[str], bool] = lambda arm: True) -> None:
    """accuracy.json: the figures of every arm's judge on the unseen pairs, as `selfplay calibrate` gives them."""
    from selfplay.calibrate import calibrate

    path = lab.out / "accuracy.json"
    if path.exists():
        return
    pairs, found = unseen_pairs(lab), {}
    for arm, about in lab.plan["arms"].items():
        if "judge" not in about.get("set", {}) or not only(arm):
            continue
        model = str(yes_no_policy(lab)) if about.get("start") == "yes_no" else None
        recipe = lab.recipe(about["set"])
        found[arm] = calibrate(
            recipe,
            str(pairs),
            lab.out / "calibration" / arm,
            model=model,
            limit=None,
            name=None,
            split="train",
            allow_code=True,
            report=lab.report,
        )
        low, high = found[arm]["accuracy_interval"]
        lab.report.note(f"judge of {arm}: accuracy {found[arm]['accuracy']:.3f} [{low:.3f}, {high:.3f}]")
    store.write_json(path, found)


def table(lab: Lab) -> str:
    """The judges' accuracy, every item, then gains over seeds against what the accuracy promises."""
    path = lab.out / "accuracy.json"
    accuracy = store.read_json(path) if path.exists() else {}
    panels = {item: read_panel(lab.folder(item) / "test") for item in lab.items() if lab.done(item)}
    rows: list[list[Any]] = []
    for item in lab.items():
        panel, start = panels.get(item), panels.get(Item(lab.plan["gains"].get(item.arm, ""), item.seed, "only"))
        if panel is None:
            rows.append([item.arm, item.seed, "not run", *[None] * 6])
            continue
        f, own = panel.figures, gain([start.scores], [panel.scores]) if start else None
        keys = ("heldout_greedy", "on_topic", "mean_length", "entropy", "kl")
        rows.append([item.arm, item.seed, f["heldout_score"], own, *(f[key] for key in keys)])
    head = ["arm", "seed", "score", "gain", "greedy", "on topic", "length", "entropy", "KL"]
    return markdown(head, rows) + "\n\n" + doses(lab, panels, accuracy)


def doses(lab: Lab, panels: dict[Item, Panel | None], accuracy: dict[str, Any]) -> str:
    rows: list[list[Any]] = []
    for arm, start in lab.plan["gains"].items():
        own, all_four = (whole(lab, panels, *names) for names in ((start, arm), ("base", "rules", start, arm)))
        judged = accuracy.get(arm)
        a = judged["accuracy"] if judged else None
        had = gain(*([panel.scores for panel in part] for part in own))
        greedy = gain(*([panel.greedy for panel in part] for part in own))
        # the rules' gain is what the others are measured by, so their seeds count that have both
        doses = ([panel.scores for panel in part] for part in all_four)
        beyond = dose_residual(*doses, accuracy=a) if a is not None else None
        low, high = judged["accuracy_interval"] if judged else (None, None)
        shown = None if a is None else f"{a:.3f} [{low:.3f}, {high:.3f}]"
        said = "not run" if had is None else verdict(lab.plan, arm, had, beyond)
        rows.append([arm, shown, len(own[0]), had, greedy, beyond, said])
    head = "judge|accuracy a|seeds|gain|greedy gain|gain beyond (2a - 1) x that of the rules|verdict"
    return markdown(head.split("|"), rows)


def whole(lab: Lab, panels: dict[Item, Panel | None], *arms: str) -> list[list[Panel]]:
    """The panels of each arm, of the seeds with which all of them were played."""
    rows = [[panels.get(Item(arm, seed, "only")) for arm in arms] for seed in lab.plan["seeds"]]
    found = [[panel for panel in row if panel is not None] for row in rows if None not in row]
    return [[row[n] for row in found] for n in range(len(arms))]


def verdict(plan: dict[str, Any], arm: str, had: Gain, beyond: Gain | None) -> str:
    """Has the gain a sign, is the coin a control, is the gain what the accuracy promises?"""
    if arm in plan["must_not_improve"] and had.verdict == "higher":
        return "improves: the metric is broken"
    said = [had.verdict]
    if arm == "coin":
        said.append(f"within {plan['bound']} of 0: {had.within(plan['bound'])}")
    elif arm != "rules" and beyond is not None:
        said.append(f"within {plan['bound']} of its dose: {beyond.within(plan['bound'])}")
    return "; ".join(said)
