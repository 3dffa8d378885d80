"""The application: training, data, files, pictures and the command line."""
