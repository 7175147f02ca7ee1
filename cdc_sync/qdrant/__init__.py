from cdc_sync.qdrant.client_packages import prepare

prepare()
