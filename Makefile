# The whole interface for developers and derivative authors; CI runs the same targets.

# `make demo SHELL=1` asks for a console, but SHELL is also the variable that names make's own shell.
ifneq ($(filter command line environment override,$(origin SHELL)),)
ifneq ($(filter-out 0 no,$(SHELL)),)
DEMO_OPTIONS := --shell
endif
override SHELL := /bin/sh
endif

DESTDIR ?=
SLOT ?= active
BOOTS ?= 30
# The distribution's interpreter: the bundle has to fit the glibc of the systems it is installed on.
PYTHON ?= /usr/bin/python3.11

BUNDLE := build/bundle/immucore
VENV := build/venv
BIN := $(VENV)/bin
PACKAGES := $(shell sed 's/:.*//' vm-tests/packages.txt)

# What is installed already stays as it is.
APT_INSTALL := apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-upgrade \
	--no-install-recommends -o Dpkg::Use-Pty=0

.PHONY: help deps check unit golden freeze install images demo vm-test soak test fuzz bench clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t16

demo: deps freeze  ## boot the demo machine and show what was mounted and when (SLOT=passive, SLOT=recovery, SHELL=1)
	@$(BIN)/python vm-tests/demo.py --slot $(SLOT) $(DEMO_OPTIONS)

test: check unit vm-test  ## run everything: linters, unit and integration tests with coverage, tests in machines

deps: $(VENV)/.stamp  ## install what is missing: Debian packages, and Python packages in build/venv
	@dpkg-query --show --showformat '$${db:Status-Status}\n' $(PACKAGES) 2>&1 | grep -qv '^installed$$' || exit 0; \
	echo "installing Debian packages that are missing"; $(APT_INSTALL) $(PACKAGES)

$(VENV)/.stamp: pyproject.toml vm-tests/packages.txt
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { echo "installing python3.11-venv"; $(APT_INSTALL) python3.11-venv; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[freeze,test,check]'
	@touch $@

check: deps  ## ruff, mypy --strict, shellcheck
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	shellcheck $(filter-out %.service,$(wildcard dracut-module/50immucore/*)) dracut-module/immucore.shutdown vm-tests/guest/*.sh .ci/run

unit: deps freeze  ## unit, golden and integration tests; at least 90 % of immucore/ has to be covered
	$(BIN)/pytest tests -n 2 --cov --cov-report=term --cov-fail-under=90

golden: deps  ## write the expected plans of tests/golden anew; read the diff before you commit it
	$(BIN)/pytest tests/golden --rewrite -q

freeze: deps  ## build the frozen agent in build/bundle
	@$(BIN)/python frozen/freeze.py

install:  ## put the frozen agent and its dracut module into DESTDIR
	@test -x $(BUNDLE)/immucore || { echo "$(BUNDLE)/immucore is not there: run 'make freeze' first" >&2; exit 1; }
	rm -rf "$(DESTDIR)/usr/lib/immucore" "$(DESTDIR)/usr/lib/dracut/modules.d/50immucore"
	mkdir -p "$(DESTDIR)/usr/bin" "$(DESTDIR)/usr/lib/immucore"
	cp -r --preserve=mode,links $(BUNDLE)/. "$(DESTDIR)/usr/lib/immucore"
	ln -sfn ../lib/immucore/immucore "$(DESTDIR)/usr/bin/immucore"
	install -D -t "$(DESTDIR)/usr/lib/dracut/modules.d/50immucore" dracut-module/50immucore/*
	chmod 644 "$(DESTDIR)"/usr/lib/dracut/modules.d/50immucore/*.service
	install -D -m 644 -t "$(DESTDIR)/usr/lib/dracut/dracut.conf.d" dracut-module/50-immucore.conf
	install -D -t "$(DESTDIR)/usr/lib/systemd/system-shutdown" dracut-module/immucore.shutdown

images: deps freeze  ## build the test derivatives: root trees, initramfs images, slot images
	$(BIN)/python vm-tests/derivative.py

vm-test: deps freeze  ## boot the derivatives in QEMU, two at a time
	$(BIN)/pytest vm-tests -n 2 --dist worksteal --durations=15

fuzz: $(VENV)/.fuzz  ## fuzz what reads the texts from outside (FUZZ_SECONDS=60 each); findings in build/fuzz
	@$(BIN)/python tests/fuzz/fuzz.py

$(VENV)/.fuzz: $(VENV)/.stamp
	$(BIN)/pip install --quiet --disable-pip-version-check --only-binary atheris --editable '.[fuzz]'
	@touch $@

soak: deps freeze  ## the VM tests of what must go well every time, with many boots each (BOOTS=30)
	$(BIN)/pytest vm-tests -n 2 --dist worksteal -m soak --boots $(BOOTS)

bench: deps freeze  ## measure side by side: start to exit, memory, sizes, many paths and devices, virtual time in QEMU
	@$(BIN)/python tests/bench/bench.py

clean:  ## remove everything that was built, the cached Debian packages too
	rm -rf build
