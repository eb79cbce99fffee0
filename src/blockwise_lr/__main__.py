from blockwise_lr.cli.entry import main

if __name__ == "__main__":
    main()
