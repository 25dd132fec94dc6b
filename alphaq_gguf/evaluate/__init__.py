"""Run converted files and judge them."""
