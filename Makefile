.PHONY: check test ci bench

check:            ## formatting, lint, types, import contracts
	.ci/run check

test:             ## install and test, as the README says
	.ci/run test

ci: test check    ## what continuous integration runs

bench:            ## the table of the README
	.venv/bin/python benchmarks/cifar10_resnet56.py
