# hamesh. `make` without a target prints this help.
SHELL   := /bin/bash
export CGO_ENABLED ?= 0

# Tools, each with a module file of its own, so that go.mod lists what the product links.
TOOL     = go tool -modfile=deploy/tools/$(1).mod $(2)

VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo devel)
STAMP    = -X github.com/hamesh/hamesh/agent.stamp=$(VERSION) -X github.com/hamesh/hamesh/cli.stamp=$(VERSION)

.DEFAULT_GOAL := help
.PHONY: help build demo test sim bench chaos fuzz lint generate clean

help: ## print this
	@awk -F':.*## ' '/^[a-z]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

build: ## bin/hameshd and bin/hactl, static
	go build -trimpath -ldflags '-s -w $(STAMP)' -o bin/ ./agent/hameshd ./cli/hactl

demo: ## the main job on this machine, in network namespaces (KEEP=1: leave it running)
	go build -o bin/ ./deploy/lab/hamesh-lab
	bin/hamesh-lab demo $(if $(KEEP),-keep)

# A directory for temporary files that is removed also where a test cannot do it, say after
# Ctrl-C. Others may pass through it, for tests of who may use a socket.
OWN_TMPDIR = export TMPDIR=$$(mktemp -d) && trap 'rm -rf "$$TMPDIR"' EXIT && chmod 711 "$$TMPDIR"

# One package at a time: most of them time real kernels and sockets. The race detector slows
# agents down so much that what loads a whole mesh runs at full speed, without it, instead;
# some tests run both ways.
FULL_SPEED = TestForwarded$$|TestStreamsOutliveMoves$$|TestRollingRestart$$|TestDual$$|TestUpgradeRefused$$|TestPairs$$
BOTH_WAYS  = TestMesh$$|TestDrain$$|TestUpgrades$$|TestStoreOutage$$|TestIPv6$$|TestSickBackends$$|TestBackendOrders$$|TestReloadByHangup$$|TestNoAPIServer$$
test: ## all tests, with the race detector, on real namespaces
	$(OWN_TMPDIR); CGO_ENABLED=1 go test -race -p 1 -timeout 30m -skip '$(FULL_SPEED)' $(ARGS) ./...
	$(OWN_TMPDIR); go test -count 1 -timeout 20m ./agent -run '$(FULL_SPEED)|$(BOTH_WAYS)'

SEEDS ?= 2000
sim: ## simulate the ownership protocol: SEEDS=2000
	go test ./agent/ownership -run TestSimulation -seeds=$(SEEDS) -timeout 0 -v

RUNS      ?= 5
TRIALS    ?= 3
BENCHMARK ?= deploy/lab/BENCHMARK.md
bench: ## the relay beside haproxy (8 minutes), fail-over beside keepalived too: RUNS=5 TRIALS=3
	go test ./agent/proxy/... -run '^$$' -bench . -benchmem
	go build -o bin/ ./deploy/lab/hamesh-lab
	bin/hamesh-lab bench -runs $(RUNS) -out $(BENCHMARK)
	bin/hamesh-lab bench -idle 10000 -for 60s
	bin/hamesh-lab failover -trials $(TRIALS) -timing default,fast $$(command -v keepalived >/dev/null && command -v haproxy >/dev/null && echo -peers)

DURATION ?= 60s
SEED     ?= 1
chaos: ## random faults against real agents: DURATION=60s SEED=1
	go build -o bin/ ./deploy/lab/hamesh-lab
	bin/hamesh-lab chaos -duration $(DURATION) -seed $(SEED)

fuzz: ## fuzz the configuration parser for a minute
	go test ./agent/config -run '^$$' -fuzz FuzzParse -fuzztime 60s -fuzzminimizetime 5x

lint: ## linters, buf lint and breaking, generated code fresh
	test -z "$$(gofmt -l $$(git ls-files '*.go') | tee /dev/stderr)"
	go vet ./...
	GOOS=darwin go vet ./cli/...
	$(call TOOL,golangci,golangci-lint) run ./...
	$(call TOOL,buf,buf) lint
	deploy/tools/breaking
	deploy/tools/fresh
	go mod tidy -diff

generate: ## make gen/ anew from proto/
	$(call TOOL,buf,buf) generate --template proto/buf.gen.yaml

clean: ## remove what build made
	rm -rf bin
