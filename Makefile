# make demo   from a clean machine to ten answering sandboxes
# make test   everything that must hold
# make help   every target
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

TARGET ?= $(or $(CARGO_TARGET_DIR),target)
PREFIX ?= /usr/local
GUEST_TRIPLE := x86_64-unknown-linux-gnu
AGENT := $(TARGET)/lib/forkd/forkd-agent
PROGRAMS := $(TARGET)/release/forkd $(TARGET)/release/forkd-controller $(TARGET)/release/forkd-vmm

# command:package, each installed only where the command is missing.
DEPS := qemu-system-x86_64:qemu-system-x86 mmdebstrap:mmdebstrap mkfs.erofs:erofs-utils \
        dpkg-deb:dpkg xz:xz-utils cc:build-essential nft:nftables busybox:busybox-static gpg:gpg \
        openssl:openssl python3:python3

# For programs that are linked statically.
STATIC := RUSTFLAGS='-C target-feature=+crt-static' \
          cargo build --target $(GUEST_TRIPLE) --target-dir $(TARGET)/static

# What the tests that boot guests find: an image store, its image as a directory of plain files, and the monitor as it is
# shipped, which is linked otherwise than what is built for tests.
DATA := $(abspath $(TARGET))/test-data
TEST_ENV := FORKD_AGENT=$(abspath $(AGENT)) FORKD_TEST_AGENT=$(abspath $(AGENT)) \
            FORKD_TEST_IMAGES=$(DATA)/images FORKD_TEST_GUEST=$(DATA)/guest \
            FORKD_TEST_IMAGE_DIR=$(DATA)/guest \
            FORKD_VMM=$(abspath $(TARGET))/release/forkd-vmm

# The built-in monitor is chosen where the CPU can run guests with it.
MONITOR := $(shell grep -qwE 'vmx|svm' /proc/cpuinfo && echo monitor)

# What of the lab `make test` runs: short, full or none.
LAB ?= short

.PHONY: help demo test test-image test-run deps need-cargo need-root build agent monitor install bench \
        bench-api bench-isolation conformance soak lab \
        check fmt clippy fuzz-short clean

help: ## Show this help
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: need-root need-cargo deps agent $(MONITOR) ## Install what is missing, build, and fork ten sandboxes
	@cargo build --release -p forkd-cli
	@$(TARGET)/release/forkd quickstart -n 10

test: need-root need-cargo deps agent ## Format, lints and all tests, real guests included
	@$(MAKE) --no-print-directory -j 3 --output-sync=line check test-image monitor
	@$(MAKE) --no-print-directory test-run

test-image: agent
	@cargo build -q -p forkd-cli
	@FORKD_URL=none FORKD_AGENT=$(AGENT) FORKD_DATA_DIR=$(DATA) FORKD_IMAGE_ROOT=$(DATA)/images \
	    $(TARGET)/debug/forkd image build --debian python3-numpy --json >$(TARGET)/test-image.json
	@install -d $(DATA)/guest
	@file() { sed -n "s/^ *\"$$1\": \"\(.*\)\",*$$/\1/p" $(TARGET)/test-image.json; }; \
	for pair in kernel:kernel kernel:vmlinuz initramfs:initramfs rootfs:rootfs; do \
	    ln -sfn "$$(file $${pair%%:*})" $(DATA)/guest/$${pair##*:}; \
	done

# The last line counts, whatever runner there is.
test-run:
	@set +e; \
	if cargo nextest --version >/dev/null 2>&1; then \
	    env $(TEST_ENV) cargo nextest run --workspace --no-fail-fast 2>&1 | tee $(TARGET)/test.log; \
	    status=$${PIPESTATUS[0]}; \
	    summary=$$(grep -a 'Summary \[' $(TARGET)/test.log | tail -1); \
	    count() { grep -oE "[0-9]+ ($$1)" <<<"$$summary" | awk '{ n += $$1 } END { print n + 0 }'; }; \
	    passed=$$(count passed); failed=$$(count 'failed|timed out|exec failed'); \
	else \
	    env $(TEST_ENV) cargo test --workspace --no-fail-fast 2>&1 | tee $(TARGET)/test.log; \
	    status=$${PIPESTATUS[0]}; \
	    count() { grep -a '^test result:' $(TARGET)/test.log | awk "{ n += \$$$$1 } END { print n + 0 }"; }; \
	    passed=$$(count 4); failed=$$(count 6); \
	fi; \
	[ "$$status" -eq 0 ] || [ "$$failed" -gt 0 ] || failed=1; \
	lab='$(LAB)'; \
	if [ "$$lab" = none ]; then \
	    echo "lab: skipped, as LAB=none asks for"; \
	else \
	    env $(TEST_ENV) cargo run -q -p xtask -- lab --data $(DATA) $(if $(filter full,$(LAB)),,--short) 2>&1 \
	        | tee $(TARGET)/lab.log; \
	    labbed=$${PIPESTATUS[0]}; \
	    last=$$(grep -aoE '^[0-9]+ passed, [0-9]+ failed$$' $(TARGET)/lab.log | tail -1); \
	    lost=$$(awk '{ print $$3 + 0 }' <<<"$$last"); \
	    [ "$$labbed" -eq 0 ] || [ "$$lost" -gt 0 ] || lost=1; \
	    passed=$$((passed + $$(awk '{ print $$1 + 0 }' <<<"$${last:-0}"))); failed=$$((failed + lost)); \
	    [ "$$labbed" -eq 0 ] || status=$$labbed; \
	fi; \
	echo "$$passed passed, $$failed failed"; \
	exit $$status

need-cargo:
	@command -v cargo >/dev/null || { \
	    echo "error: cargo is not on PATH" >&2; \
	    echo "help: install Rust 1.95 or newer from https://rustup.rs, then run make again" >&2; exit 1; }

need-root:
	@[ "$$(id -u)" -eq 0 ] || { \
	    echo "error: this needs root: packages are installed, guest images built, machines run" >&2; \
	    echo "help: run it as root (sudo -E env PATH=\"\$$PATH\" make …); make build needs no root" >&2; exit 1; }

deps: ## Install missing Debian packages (root)
	@missing=""; \
	for pair in $(DEPS); do \
	    command -v "$${pair%%:*}" >/dev/null || missing="$$missing $${pair##*:}"; \
	done; \
	python3 -c 'import ensurepip, venv' 2>/dev/null || missing="$$missing python3-venv"; \
	[ -z "$$missing" ] && exit 0; \
	command -v apt-get >/dev/null || { \
	    echo "error: missing:$$missing, and there is no apt-get to install them with" >&2; \
	    echo "help: install them with this system's own package manager, then run make again" >&2; exit 1; }; \
	[ "$$(id -u)" -eq 0 ] || { \
	    echo "error: missing:$$missing" >&2; \
	    echo "help: run as root: apt-get install$$missing" >&2; exit 1; }; \
	echo "installing$$missing"; \
	export DEBIAN_FRONTEND=noninteractive; \
	apt-get update -q && apt-get install -y -q --no-install-recommends $$missing

build: need-cargo agent monitor ## Build forkd, forkd-controller, forkd-vmm and the guest agent
	@cargo build --release -p forkd-cli -p forkd-daemon

agent: need-cargo ## Build the guest agent, statically linked
	@$(STATIC) -p forkd-agent --profile guest
	@install -D -m 755 $(TARGET)/static/$(GUEST_TRIPLE)/guest/forkd-agent $(AGENT)

monitor: need-cargo ## Build the machine monitor, statically linked: its forks have less to copy
	@$(STATIC) -p forkd-vmm --profile monitor
	@install -D -m 755 $(TARGET)/static/$(GUEST_TRIPLE)/monitor/forkd-vmm $(TARGET)/release/forkd-vmm

install: build ## Install into PREFIX (/usr/local)
	install -D -m 755 -t $(DESTDIR)$(PREFIX)/bin $(PROGRAMS)
	install -D -m 755 $(AGENT) $(DESTDIR)$(PREFIX)/lib/forkd/forkd-agent
	install -d $(DESTDIR)$(PREFIX)/share/man/man1
	$(TARGET)/release/forkd man $(DESTDIR)$(PREFIX)/share/man/man1

bench: need-root need-cargo deps build ## Measure on this machine; also writes target/bench.html
	@$(TARGET)/release/forkd quickstart -n 1 >/dev/null
	@$(TARGET)/release/forkd bench --tag quickstart --n 20 --html $(TARGET)/bench.html

bench-api: need-root need-cargo deps test-image monitor ## Measure the HTTP interface, and where a fork of ten takes its time
	@cargo bench -q -p forkd-daemon
	@env $(TEST_ENV) cargo bench -q -p forkd-daemon -- qemu

bench-isolation: need-root need-cargo deps monitor ## Measure what a network, a control group and the jail cost a fork
	@env $(TEST_ENV) cargo test -q --release -p forkd-engine --lib -- --ignored what_isolation_costs --nocapture

conformance: need-cargo ## Send the interface what its description allows and forbids (schemathesis, from PyPI)
	@cargo test -q -p forkd-daemon --test it -- conformance --nocapture

soak: need-root need-cargo deps test-image monitor ## Kill the daemon during a hundred fan-outs of real guests
	@env $(TEST_ENV) FORKD_SOAK_ROUNDS=100 cargo test -q -p forkd-daemon --test it -- killed_during --nocapture

image-test: need-root need-cargo deps build ## Build the container image without a registry, and fork in it as a Pod does
	@command -v buildah >/dev/null || apt-get install -y -q --no-install-recommends buildah
	@packaging/docker/test.sh $(TARGET)/release $(AGENT)

lab: need-root need-cargo deps test-image monitor ## Run the kvm engine with Linux guests in an emulated node
	@env $(TEST_ENV) cargo run -q -p xtask -- lab --data $(DATA)

check: fmt clippy ## Format and lints

fmt: need-cargo
	@cargo fmt --all --check

clippy: need-cargo
	@cargo clippy --workspace --all-targets -- -D warnings

fuzz-short: need-cargo ## Every fuzz target for a minute (nightly, cargo-fuzz)
	@for target in $$(cargo +nightly fuzz list); do \
	    cargo +nightly fuzz run "$$target" -- -max_total_time=60; \
	done

clean: ## Remove what was built
	@cargo clean
