"""Every key of an experiment, its checks, and the merge of YAML files."""
