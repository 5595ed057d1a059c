import json
import sys
from pathlib import Path

from tests import golden

match sys.argv[1:]:
    case [] | ["--again"]:
        golden.write(again=bool(sys.argv[1:]))
    case ["write", folder]:
        golden.write_models(Path(folder), golden.models())
    case ["write-all", folder]:
        golden.write_models(Path(folder), golden.every_model())
    case ["check", folder]:
        print(json.dumps(golden.check_models(Path(folder))))
