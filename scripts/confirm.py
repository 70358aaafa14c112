"""The confirmatory runs: claims of docs/claims*.yaml, judged on seeds that nothing was chosen on.

    python scripts/confirm.py [confirm | requests]

Resumes, also within a seed. Writes figures/confirm*/results.csv (of all seeds), confirm.csv (the verdicts) and
plan.json (what was fixed before the first seed); refuses to go on where claims or versions have changed since.
"""

import argparse
import hashlib
import subprocess
import sys
from pathlib import Path

import pandas as pd

sys.path.insert(0, str(Path(__file__).parent))
from pages import put

from dmmlib.analysis import confirm
from dmmlib.errors import DmmError, PresetError
from dmmlib.files import home, read_json, read_table, write_json, write_table
from dmmlib.registry import all_versions
from dmmlib.study import Study

CLAIMS = Path(__file__).parents[1] / "docs" / "claims.yaml"
REQUESTS = CLAIMS.with_stem("claims_requests")
PAGE, README = CLAIMS.with_suffix(".md"), CLAIMS.parents[1] / "README.md"


def fixed(claims: Path) -> dict[str, object]:
    """What may not change between the first seed and the last."""
    return {"claims": hashlib.sha256(claims.read_bytes()).hexdigest(), "versions": all_versions()}


def check(folder: Path, now: dict[str, object]) -> None:
    """Record what is fixed before the first seed; PresetError where it is no longer what was recorded."""
    path = folder / "plan.json"
    if not path.exists():
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=CLAIMS.parent).stdout
        write_json(path, now | {"commit": commit.strip()})
    recorded = read_json(path)
    if changed := [key for key, value in now.items() if recorded.get(key) != value]:
        raise PresetError(
            f"{' and '.join(changed)} changed since {path} was written; put them back, or give docs/claims.yaml seeds "
            f"that were never used and move {folder} away."
        )


def main(preset: str = "confirm", claims: Path = CLAIMS, folder: Path | None = None) -> pd.DataFrame:
    """Run every seed that is not yet in the table, and judge when all are."""
    folder = folder or home() / "figures" / "confirm"
    plan, path = confirm.load(claims), folder / "results.csv"
    check(folder, fixed(claims))
    done = read_table(path) if path.exists() else pd.DataFrame({"seed": []})
    for seed in plan.seeds:
        if not (done["seed"] == seed).any():
            study = Study(preset, {"seed": seed, "data.options.draw": seed})
            done = pd.concat([done, study.results().assign(seed=seed)], ignore_index=True).astype({"seed": int})
            write_table(path, done)
            sys.stdout.write(f"seed {seed}: done\n")
    judged = confirm.judge(plan, done)
    write_table(folder / "confirm.csv", judged)
    return judged


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", nargs="?", choices=["confirm", "requests"], help="both, if it is left out")
    wanted = parser.parse_args().run
    try:
        for claims, block in ((CLAIMS, "claims"), (REQUESTS, "requests-claims")):
            put(PAGE, block, confirm.written(confirm.load(claims)))
        if wanted != "requests":
            put(README, "confirm", confirm.verdicts(judged := main()))
            sys.stdout.write(judged.to_string(index=False) + "\n")
        if wanted != "confirm":
            judged = main("requests", REQUESTS, home() / "figures" / "confirm_requests")
            put(PAGE, "requests-verdicts", confirm.verdicts(judged, REQUESTS.name))
            sys.stdout.write(judged.to_string(index=False) + "\n")
    except DmmError as error:
        sys.exit(f"error: {error}")
