"""Sources of the ggml plug-in, C++17, which is compiled on the machine that uses it: no Python code."""
