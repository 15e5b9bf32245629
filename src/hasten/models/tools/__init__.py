"""Tool calls: how each family of models is told about functions and writes that it calls one."""
