"""`python -m selfplay`: the same as the command `selfplay`."""

import sys

from selfplay.cli import main

sys.exit(main())
