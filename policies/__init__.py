"""Built-in policies, one small file each. They import `lab.policy` and the standard library, nothing else."""
