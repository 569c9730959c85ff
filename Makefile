# The front door. Each target is a thin call of `.venv/bin/python -m jobs <verb>`; options travel as exported variables:
#   make submit RECIPE=unic-b SET="data.source=s3://bucket/images train.batch=1024"
# make itself ends with 2 whenever a command fails and names that command's own code: 2 wrong input, 3 not ready,
# 75 preempted, 1 failed.
SHELL := /bin/sh
PYTHON ?= python3
OPTIONS := RECIPE RUN SET PROFILE LAUNCHER STORE DRY FRESH DIRTY DETACH JSON EVAL FORMAT GPU GPUS NPROC FORCE DAYS SRC DST SPLIT SHORT QUALITY WORKERS \
	LICENCE TAIL CLUSTER SWEEP AFTER RANK FOLLOW METHOD CHECKPOINT DATA CODECS START QUICK BASE TAG TARGET VIEWS CODEC VERIFY ADVISE SELECT PYTHON RUNS SEED RECORD
VERBS := recipes teachers plan doctor submit status logs cancel resume shards features eval export report gc image manifests

# Values reach Python exactly as they were given: neither make nor a shell looks inside, so $(...) and quotes are text.
$(foreach name,$(OPTIONS),$(eval override $(name) := $$(value $(name))))
export $(OPTIONS)

# Python takes Retort from here, and nothing from whatever folder its processes work in.
JOBS := PYTHONSAFEPATH=1 PYTHONPATH="$$PWD$${PYTHONPATH:+:$$PYTHONPATH}" .venv/bin/python -m jobs

# Each process takes whole files, the longest first, and computes in one thread: more would wait for each other's.
PYTEST := OMP_NUM_THREADS=1 .venv/bin/python -m pytest --dist loadfile --no-loadscope-reorder
# Tests of clusters wait a lot: one more process than two cores could feed.
BESIDE := 3
PACKAGES := radosgw ceph-mon ceph-osd slurm-wlm munge slurmdbd mariadb-server iproute2 buildah mmdebstrap

.PHONY: help setup demo test test-system soak packages lint bench $(VERBS)
.DEFAULT_GOAL := help

help:  ## this list
	@sed -n 's/^\([a-z -]*\):.*  ## \(.*\)/  make \1\t\2/p' Makefile | expand -t 36

setup:  ## the virtual environment from the lock file, when it is missing or stale
	@"$$PYTHON" jobs/bootstrap.py

demo:  ## the whole journey on this machine, in minutes
	@"$$PYTHON" jobs/bootstrap.py demo
	@$(JOBS) demo

test: setup  ## what anybody can run: unit tests, golden cases, a whole run of each journey; minutes [RECORD=1: into tests/durations.json]
	@$(PYTEST) -n logical --maxprocesses 4 --ignore tests/system
	@echo "left out: whole runs with a real S3 server, SLURM, Ray and the image: make test-system (root, and the packages of make packages)"

test-system: setup  ## whole runs, a real S3 server, SLURM, Ray, the image, faults: needs root and `make packages`
	@$(PYTEST) -n $(BESIDE) tests/system
	@echo "left out: random interruptions for as long as asked, and whole matrices: make soak"

soak: setup  ## random interruptions [RUNS=20 SEED=1], then all of which make test-system runs a covering part
	@.venv/bin/python -m tests.system.soak --runs "$${RUNS:-20}" --seed "$${SEED:-1}"
	@$(PYTEST) tests/system -m soak

packages:  ## the Debian packages that make test-system needs: apt-get install -y --no-install-recommends $$(make packages)
	@echo $(PACKAGES)

lint: setup  ## ruff, mypy and hadolint
	@.venv/bin/ruff check .
	@.venv/bin/mypy
	@.venv/bin/hadolint docker/Dockerfile

$(VERBS): setup
	@$(JOBS) $@

bench: setup
	@if [ -n "$$CHECKPOINT" ]; then .venv/bin/python -m tests.perf.checkpoint; \
	elif [ -n "$$DATA" ]; then .venv/bin/python -m tests.perf.data; \
	elif [ -n "$$CODECS" ]; then .venv/bin/python -m tests.perf.codecs; \
	elif [ -n "$$START" ]; then .venv/bin/python -m tests.perf.start; \
	elif [ -n "$$METHOD" ]; then .venv/bin/python -m tests.perf; else $(JOBS) bench; fi

# What the verbs above do, for `make help`:
recipes:  ## table of recipes
teachers:  ## table of known weights: teachers and released students
plan:  ## what a recipe costs: RECIPE= [GPU=h100 GPUS=8] [PROFILE=] [SET=]
doctor:  ## check this machine [and a recipe's inputs: RECIPE=] [QUICK=1]
submit:  ## start or resume a recipe: RECIPE= [LAUNCHER=] [CLUSTER=] [SET="a.b=c ..."] [SWEEP="a.b=1,2"] [AFTER=eval,export] [PROFILE=smoke] [DRY=1] [FRESH=1] [DETACH=1]
status:  ## all runs [or one: RUN=; or those of a sweep: SWEEP=]
logs:  ## what the ranks of a run wrote: RUN= [RANK=0] [TAIL=20] [FOLLOW=1]
cancel:  ## stop a run: RUN=
resume:  ## go on from the newest checkpoint: RUN= [NPROC=4] [SET=] [RECIPE=] [LAUNCHER=] [FORCE=1]
shards:  ## rewrite a data set into indexed shards: SRC= DST= [SPLIT=train] [SHORT=256 QUALITY=90] [WORKERS=] [LICENCE="..."]
eval:  ## evaluate a run's student: RUN= [EVAL=knn,linear]
export:  ## write a run's student for others: RUN= [FORMAT=timm,safetensors]
report:  ## write a run's report: RUN=
gc:  ## remove what no run refers to: [DRY=1] [DAYS=30: also runs that ended so long ago and features that old]
manifests:  ## slurm/out/RECIPE.sbatch or k8s/out/RECIPE.yaml, to submit by hand: RECIPE= [LAUNCHER=ray] [CLUSTER=] [SET=]
image:  ## the container image: BASE=NAME@sha256:... [TAG=retort:latest] [TARGET=train|demo]
features:  ## store teacher outputs: RECIPE= [VIEWS=1] [SPLIT=train,heldout,texts] [CODEC=bf16] [LAUNCHER=] [CLUSTER=] [NPROC=8: workers, else one for each GPU here] [ADVISE=1] [VERIFY=1] [SELECT="URI top=5"] [DRY=1]
bench:  ## throughput and overheads on this machine: [RECIPE=]; METHOD=udi: against plain formulas; CHECKPOINT=1: of saving; DATA=1: of reading; CODECS=1: of stored features; START=1: of starting ranks
