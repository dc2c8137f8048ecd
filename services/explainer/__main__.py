import sys

from services.explainer.server import main

sys.exit(main())
