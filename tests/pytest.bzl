"""`py_test` that runs its sources with pytest."""

load("@rules_python//python:defs.bzl", _py_test = "py_test")

def py_test(name, srcs):
    """A test whose sources pytest collects; it may import every room and the helpers of the tests.

    Args:
      name: name of the target.
      srcs: test files.
    """
    _py_test(
        name = name,
        timeout = "eternal",
        srcs = srcs + ["//tests:pytest_main.py"],
        args = ["$(location %s)" % src for src in srcs],
        data = ["//:pyproject.toml"],
        main = "//tests:pytest_main.py",
        deps = ["//tests"],
    )
