"""`py_test` that runs its sources with pytest."""

load("@rules_python//python:defs.bzl", _py_test = "py_test")

def py_test(name, srcs, deps = [], data = [], **kwargs):
    """A test whose sources pytest collects.

    Args:
      name: name of the target.
      srcs: test files.
      deps: what they import.
      data: what they read.
      **kwargs: passed on to the rule.
    """
    _py_test(
        name = name,
        srcs = srcs + ["//tests:pytest_main.py"],
        main = "//tests:pytest_main.py",
        args = ["$(location %s)" % src for src in srcs],
        data = data + ["//:pyproject.toml"],
        deps = deps + ["//tests:conftest"],
        **kwargs
    )
