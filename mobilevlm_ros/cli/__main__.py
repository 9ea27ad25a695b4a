"""``python -m mobilevlm_ros.cli``, where the command itself is not on the path."""

import sys

from mobilevlm_ros.cli.main import main

sys.exit(main())
