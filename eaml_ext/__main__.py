"""``python -m eaml_ext``."""

import sys

from eaml_ext.cli import main

if __name__ == "__main__":
    sys.exit(main())
