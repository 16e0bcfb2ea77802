# The commands of this repository. `make help` lists them.
CARGO ?= cargo
TARGET := $(or $(CARGO_TARGET_DIR),target)
BIN := $(TARGET)/release
PROGRAMS := -p metadata-raft -p storage-daemon -p nbd-client -p csi-driver -p ashlar-cli -p ashlar-bench

.DEFAULT_GOAL := help
.PHONY: help build demo check test bench bench-quick bench-csi images fmt clean-dev

help: ## Lists the commands
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

build: ## Builds all programs (release), into target/release
	$(CARGO) build --release --locked $(PROGRAMS)

demo: build ## A replicated volume under fio while a daemon and the metadata leader are killed
	@.ci/install-tools.sh demo
	@$(BIN)/ashlar-bench demo --directory $(TARGET)/ashlar-demo

check: ## Formatting and lints, without running anything
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets --locked -- -D warnings

test: ## Everything that is tested: format, lints, unit, simulation, end to end
	@.ci/test.sh

bench: build ## Speed, CPU and memory against the raw disk and qemu-nbd, and CSI; results in bench/out
	@.ci/install-tools.sh demo
	@$(BIN)/ashlar-bench run

bench-quick: build ## The same in two minutes, with numbers that say little
	@.ci/install-tools.sh demo
	@$(BIN)/ashlar-bench run --quick

bench-csi: build ## Only the load on the CSI driver: 1,000 volumes made, published and deleted
	@$(BIN)/ashlar-bench csi

images: ## Both container images as OCI archives, without a container engine; into target/images/out
	@.ci/images.sh compile

fmt: ## Formats the code
	$(CARGO) fmt --all

clean-dev: ## Stops and deletes the development cluster in .ashlar-dev
	@$(BIN)/ashlar dev down --purge
