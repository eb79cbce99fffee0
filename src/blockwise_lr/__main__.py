from blockwise_lr.cli import main

if __name__ == "__main__":
    main()
