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

BUNDLES := build/bundle
VENV := build/venv
BIN := $(VENV)/bin
# What the booted system has: units, and drop-ins below the folder that they have in /usr/lib/systemd.
SYSTEM := dracut-module/system
UNITS := $(wildcard $(SYSTEM)/*.service $(SYSTEM)/*.timer $(SYSTEM)/*.target $(SYSTEM)/*.path)
DROP_INS := $(wildcard $(SYSTEM)/*.conf.d/*.conf $(SYSTEM)/system/*.d/*.conf)
PACKAGES := $(shell sed 's/:.*//' vm-tests/packages.txt)

# What is installed already stays as it is.
APT_INSTALL := apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-upgrade \
	--no-install-recommends -o Dpkg::Use-Pty=0

.PHONY: help deps check unit golden freeze install images demo vm-test soak test fuzz bench clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t16

demo: deps freeze  ## boot the demo machine and show what was mounted and when (SLOT=passive, SLOT=recovery, SHELL=1; SCENARIO=bad-upgrade)
	@$(BIN)/python vm-tests/demo.py --slot $(SLOT) $(DEMO_OPTIONS) $(if $(SCENARIO),--scenario $(SCENARIO))

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

freeze: deps  ## build the frozen programs, the initramfs' and the booted system's, in build/bundle
	@$(BIN)/python frozen/freeze.py

# A unit of the booted system is enabled where its own [Install] section says, by a link beside it: an image-based
# system has no presets that anybody runs, and what a derivative does not want it masks.
install:  ## put the frozen programs, the dracut module and the booted system's units into DESTDIR
	@for program in immucore immucore-system; do test -x $(BUNDLES)/$$program/immucore || \
		{ echo "$(BUNDLES)/$$program is not there: run 'make freeze' first" >&2; exit 1; }; done
	rm -rf "$(DESTDIR)/usr/lib/immucore/immucore" "$(DESTDIR)/usr/lib/immucore/_internal" \
		"$(DESTDIR)/usr/lib/immucore-system" "$(DESTDIR)/usr/lib/dracut/modules.d/50immucore"
	mkdir -p "$(DESTDIR)/usr/bin" "$(DESTDIR)/usr/lib/immucore/checks.d"
	cp -r --preserve=mode,links $(BUNDLES)/immucore $(BUNDLES)/immucore-system "$(DESTDIR)/usr/lib"
	ln -sfn ../lib/immucore-system/immucore "$(DESTDIR)/usr/bin/immucore"
	install -D -t "$(DESTDIR)/usr/lib/dracut/modules.d/50immucore" dracut-module/50immucore/*
	chmod 644 "$(DESTDIR)"/usr/lib/dracut/modules.d/50immucore/*.service
	install -D -m 644 -t "$(DESTDIR)/usr/lib/dracut/dracut.conf.d" dracut-module/50-immucore.conf
	install -D -t "$(DESTDIR)/usr/lib/systemd/system-shutdown" dracut-module/immucore.shutdown
	set -e; for file in $(UNITS); do \
		install -D -m 644 -t "$(DESTDIR)/usr/lib/systemd/system" $$file; \
		for target in $$(sed -n 's/^WantedBy=//p' $$file); do \
			mkdir -p "$(DESTDIR)/usr/lib/systemd/system/$$target.wants"; \
			ln -sfn ../$${file##*/} "$(DESTDIR)/usr/lib/systemd/system/$$target.wants/$${file##*/}"; \
		done; \
	done
	set -e; for file in $(DROP_INS); do \
		folder=$${file#$(SYSTEM)/}; \
		install -D -m 644 -t "$(DESTDIR)/usr/lib/systemd/$${folder%/*}" $$file; \
	done

images: deps freeze  ## build the test derivatives: root trees, initramfs images, slot images
	$(BIN)/python vm-tests/derivative.py

vm-test: deps freeze  ## boot the derivatives in QEMU, two at a time
	$(BIN)/pytest vm-tests -n 2 --dist worksteal --durations=15

fuzz: $(VENV)/.fuzz  ## random examples for what holds in general, then fuzz what reads texts from outside (FUZZ_SECONDS=60 each)
	@$(BIN)/pytest tests/unit -q --hypothesis-profile=random
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
