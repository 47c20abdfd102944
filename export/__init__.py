"""The side room of other people's programs: transformers, llama.cpp. See README.md."""
