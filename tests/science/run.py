"""`make science`: experiments that could fail. README.md says what is asked; a_spin.yaml, b_judges.yaml and c_rounds.yaml are
the plans, and are executed as they stand.

    python tests/science/run.py                              # all, then the tables
    python tests/science/run.py B --arm coin --seed 0        # one arm with one seed; what it needs must be there
    python tests/science/run.py C --list                     # what is done and what is left, with minutes of one core
    python tests/science/run.py A B --table                  # the tables of what is there, in Markdown
    python tests/science/run.py C --plot score_kl.svg        # C's curves of score against KL; needs matplotlib
    python tests/science/run.py B --dry-run                  # checks every recipe; plays nothing

A second call goes on where the first one stopped. Two calls may run at once on different arms or seeds, once `--prepare` is
done.
"""

import argparse
import sys
from pathlib import Path

import judges
import rounds
import spin
import spin_table
from lab import PLANS, ROOT, Item, Lab, read_plan

from selfplay.errors import DataError, SelfplayError
from selfplay.plan import make_plan
from selfplay.recipe_file import parse_yaml

PREPARE = {"A": spin.prepare, "B": judges.prepare, "C": judges.prepare}
TABLES = {"A": spin_table.table, "B": judges.table, "C": rounds.table}


def main(arguments: list[str] | None = None) -> int:
    """0; 1 where an item failed, after all others were tried."""
    asked = parse(arguments)
    failed = 0
    for id in asked.experiments or list(PLANS):
        lab = open_lab(id, asked)
        chosen = [i for i in lab.items() if asked.arm in (None, i.arm) and asked.seed in (None, i.seed)]
        try:
            if asked.list:
                print(listed(lab, chosen))
            elif asked.plot:
                plot(lab, asked.plot)
            elif not asked.table:
                PREPARE[id](lab, data_only=asked.dry_run)
                failed += 0 if asked.prepare else sum(not tried(lab, item, dry=asked.dry_run) for item in chosen)
        except SelfplayError as error:
            print(f"{id}: {error}", file=sys.stderr)
            failed += 1
        if not (asked.list or asked.plot or asked.dry_run or asked.prepare):
            print(f"\n## Experiment {id}\n\n{lab.plan['question']}\n\n{TABLES[id](lab)}\n", flush=True)
    return 1 if failed else 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiments", nargs="*", choices=[*PLANS, []], metavar="A|B|C", help="none: all three")
    parser.add_argument("--arm", help="this arm alone")
    parser.add_argument("--seed", type=int, help="this seed alone")
    parser.add_argument("--list", action="store_true", help="say what is done and what is left")
    parser.add_argument("--table", action="store_true", help="print the tables; play nothing")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="C: draw score against KL; play nothing")
    parser.add_argument("--dry-run", action="store_true", help="check every recipe; play nothing")
    parser.add_argument("--prepare", action="store_true", help="do only what all arms share, as the judges' accuracy")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "science")
    parser.add_argument("--model", default=str(ROOT / "models" / "smollm2-135m-instruct"))
    parser.add_argument("--instructions", default="", help="A: rows of instruction/input/output, .json or .jsonl")
    parser.add_argument("--embeddings", default="", help="A: the folder of a sentence-transformers model")
    parser.add_argument("--ifeval", default=str(ROOT / "data" / "ifeval_single.jsonl"), help="C: of make mini-data")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override every recipe")
    return parser.parse_args(arguments)


def open_lab(id: str, asked: argparse.Namespace) -> Lab:
    """The experiment with what the command line names."""
    files = {"data": asked.out / id / "data", "here": Path(__file__).parent, "ifeval": asked.ifeval}
    files |= {"heldout": ROOT / "recipes" / "data" / "quickstart_heldout.jsonl"}
    files |= {name: vars(asked)[name] for name in ("instructions", "embeddings") if vars(asked)[name]}
    places = {name: str(Path(path).resolve()) for name, path in files.items()}
    extra = {}
    for text in asked.set:
        key, _, value = text.partition("=")
        extra[key] = parse_yaml(f"value: {value}", f"--set {text}")[0]["value"]
    return Lab(id, read_plan(id), (asked.out / id).resolve(), str(Path(asked.model).resolve()), places, extra)


def tried(lab: Lab, item: Item, *, dry: bool) -> bool:
    """Plays an item, or with `dry` checks its recipes. False where it failed: the others are still worth playing."""
    name = f"{lab.id} {item.arm}, seed {item.seed}, {item.point}"
    try:
        if dry:
            check(lab, item)
        elif lab.done(item) is None:
            from play import play  # it loads torch

            lab.report.note(f"--- {name}")
            play(lab, item)
    except SelfplayError as error:
        print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr)
        return False
    return True


def check(lab: Lab, item: Item) -> None:
    """Raises what playing the item would raise about its recipes and its prompts."""
    arm = lab.arm(item)
    if arm.get("kind", "iterate") in ("iterate", "offline"):
        recipe = lab.recipe(arm.get("set", {}), lab.point(item), seed=item.seed)
        plan = make_plan(recipe, lab.folder(item) / "run")
        steps = [one.max_steps for one in plan.rounds]
        print(f"{lab.id} {item.place}: {[one.num_prompts for one in plan.rounds]} prompts, at most {steps} steps")
    for name, panel in lab.plan["panels"].items():
        recipe = lab.recipe(panel, arm.get("panel", {}), seed=item.seed)
        make_plan(recipe.model_copy(update={"rounds": 1}), lab.folder(item) / name)


def plot(lab: Lab, path: Path) -> None:
    """Raises DataError for an experiment that has no curve."""
    if lab.id != "C":
        raise DataError(f"--plot draws score against KL, which only C has: run.py C --plot {path}")
    import curves  # it loads matplotlib

    curves.draw(lab, path)
    print(f"{lab.id}: {path}")


def listed(lab: Lab, items: list[Item]) -> str:
    """One line an item, then the minutes of one core that are left."""
    lines, left = [], 0.0
    for item in items:
        minutes = lab.minutes(item)
        done = lab.done(item) is not None
        left += 0 if done else minutes
        lines.append(f"{lab.id} {item.place}: {'done' if done else f'about {minutes:g} min'}")
    prepare = f"{lab.plan['minutes']['prepare']} to prepare"
    return "\n".join([*lines, f"{lab.id}: about {left:.0f} min of one core left, and {prepare}"])


if __name__ == "__main__":
    sys.exit(main())
