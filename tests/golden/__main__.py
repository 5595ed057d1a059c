import json
import sys
from pathlib import Path

from tests import golden, zoo

match sys.argv[1:]:
    case []:
        golden.write(golden.FOLDER, {name: zoo.ALL[name] for name in golden.NAMES})
        golden.write_by_value(golden.FOLDER / "by-value")
    case ["write", folder]:
        golden.write(Path(folder), golden.models())
    case ["write-all", folder]:
        golden.write(Path(folder), golden.every_model())
    case ["check", folder]:
        print(json.dumps(golden.check_all(Path(folder))))
