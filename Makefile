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
        dpkg-deb:dpkg xz:xz-utils cc:build-essential nft:nftables busybox:busybox-static

# A parent of 512 MiB, ten forks and the builds: tests that boot guests run two at a time.
export FORKD_TEST_DATA ?= $(abspath $(TARGET))/test-data
export FORKD_AGENT_BUILT := $(abspath $(AGENT))

.PHONY: help demo test deps need-cargo need-root build agent install bench lab check fmt clippy \
        fuzz-short clean

help: ## Show this help
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: need-root need-cargo deps build ## Install what is missing, build, and fork ten sandboxes
	@$(TARGET)/release/forkd quickstart -n 10

test: need-root need-cargo deps check agent test-run ## Format, lints and all tests, real guests included

.PHONY: test-run
test-run:
	@if cargo nextest --version >/dev/null 2>&1; then \
	    set +e; \
	    cargo nextest run --workspace --no-fail-fast --final-status-level fail 2>&1 \
	        | tee $(TARGET)/test.log; \
	    status=$${PIPESTATUS[0]}; \
	    passed=$$(grep -aoE '[0-9]+ passed' $(TARGET)/test.log | tail -1 | grep -oE '[0-9]+'); \
	    failed=$$(grep -aE 'Summary' $(TARGET)/test.log | tail -1 | grep -oE '[0-9]+ (failed|timed out)' \
	        | awk '{ n += $$1 } END { print n + 0 }'); \
	else \
	    set +e; \
	    cargo test --workspace --no-fail-fast 2>&1 | tee $(TARGET)/test.log; \
	    status=$${PIPESTATUS[0]}; \
	    passed=$$(grep -a '^test result:' $(TARGET)/test.log | awk '{ n += $$4 } END { print n + 0 }'); \
	    failed=$$(grep -a '^test result:' $(TARGET)/test.log | awk '{ n += $$6 } END { print n + 0 }'); \
	fi; \
	[ "$$status" -eq 0 ] || [ "$${failed:-0}" -ne 0 ] || failed=1; \
	echo "$${passed:-0} passed, $${failed:-0} failed"; \
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

build: need-cargo agent ## Build forkd, forkd-controller, forkd-vmm and the guest agent
	@cargo build --release -p forkd-cli -p forkd-daemon -p forkd-vmm

agent: need-cargo ## Build the guest agent, statically linked
	@RUSTFLAGS='-C target-feature=+crt-static' \
	    cargo build -p forkd-agent --profile guest --target $(GUEST_TRIPLE) --target-dir $(TARGET)/static
	@install -D -m 755 $(TARGET)/static/$(GUEST_TRIPLE)/guest/forkd-agent $(AGENT)

install: build ## Install into PREFIX (/usr/local)
	install -D -m 755 -t $(DESTDIR)$(PREFIX)/bin $(PROGRAMS)
	install -D -m 755 $(AGENT) $(DESTDIR)$(PREFIX)/lib/forkd/forkd-agent
	install -d $(DESTDIR)$(PREFIX)/share/man/man1
	$(TARGET)/release/forkd man $(DESTDIR)$(PREFIX)/share/man/man1

bench: need-root need-cargo deps build ## Measure on this machine; also writes target/bench.html
	@$(TARGET)/release/forkd quickstart -n 1 >/dev/null
	@$(TARGET)/release/forkd bench --tag quickstart --n 20 --html $(TARGET)/bench.html

lab: need-cargo deps ## Run the machine monitor's suite in an emulated node with true virtualisation
	@cargo run -q -p xtask -- lab

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
