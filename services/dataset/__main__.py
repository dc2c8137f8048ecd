import sys

from services.dataset.server import main

sys.exit(main())
