"""The paper's figures and ours, drawn from run folders."""
