"""Random inputs against the tool, from seeds that are printed: `passes` draws compositions of passes, `specs` mutates specs.

python tools/fuzz.py passes --count 200 --seed 1 --jobs 2
python tools/fuzz.py passes --replay tests/fuzz_cases/some.json
"""

import importlib
import sys
from pathlib import Path

#: each part is a script next to this one, with a `main` that reads the command line and returns the exit status
PARTS = {path.stem.removeprefix("fuzz_"): path.stem for path in sorted(Path(__file__).parent.glob("fuzz_*.py"))}


def main() -> int:
    if len(sys.argv) < 2 or sys.argv[1] not in PARTS:
        print(__doc__.strip() if __doc__ else "", file=sys.stderr)
        print(f"\nThe parts are {', '.join(PARTS)}.", file=sys.stderr)
        return 2
    script = Path(__file__).with_name(f"{PARTS[sys.argv[1]]}.py")
    sys.argv = [str(script), *sys.argv[2:]]
    return int(importlib.import_module(script.stem).main())


if __name__ == "__main__":
    sys.exit(main())
